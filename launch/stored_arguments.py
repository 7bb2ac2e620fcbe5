"""The arguments of ranks in a temporary file, whose tensors all processes map: the host holds them once.

multiprocessing would pickle the arguments for each rank, and torch would send tensors through /dev/shm, which
has only 64 MB in many containers. The file has no name: the system frees it with the last process that has it
open, however that process ends.
"""

from __future__ import annotations

import mmap
import pickle
import tempfile
from io import BytesIO
from multiprocessing import reduction
from typing import Any, Self

import torch

from options.errors import UserError

ALIGNMENT = 64  # bytes, a multiple of every element's size

# Where a tensor lies in the file: (offset in bytes, shape, dtype).
Location = tuple[int, torch.Size, torch.dtype]


class StoredArguments:
    """Picklable arguments in an unnamed temporary file. multiprocessing can send it to a child process.

    Tensors of `args` are replaced in place by mappings of the file, which share its pages with the ranks'.
    Writing to a mapping changes only the copy of the process that writes.

    Raises UserError if the folder of temporary files cannot take them.
    """

    def __init__(self, args: tuple):
        self.file: Any = None
        try:
            self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 # `close` closes it
            pickler = _Pickler(self.file)
            pickler.dump(args)
            self.pickled = pickler.write(pickler.stream.getbuffer()), pickler.stream.tell()
        except OSError as e:
            self.close()
            raise UserError(
                f"{tempfile.gettempdir()}: cannot take the data that goes to the ranks ({e.strerror or e});"
                " TMPDIR names another folder for temporary files"
            ) from e
        if pickler.tensors:
            mapping = _map(self.file.fileno())
            for tensor, location in pickler.tensors.values():
                tensor.data = _mapped_tensor(mapping, location)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file in this process. Its mappings, and those of other processes, stay valid."""
        if self.file:
            self.file.close()

    def __reduce__(self) -> tuple:
        """Pickle for a process that multiprocessing is starting: it inherits the open file."""
        return _ReceivedArguments, (reduction.DupFd(self.file.fileno()), *self.pickled)


class _ReceivedArguments:
    """The arguments in a process that multiprocessing has started."""

    def __init__(self, inherited: Any, begin: int, size: int):
        self.inherited, self.begin, self.size = inherited, begin, size

    def load(self) -> tuple:
        """Return the arguments. Their tensors are mappings of the file. Call it once."""
        with open(self.inherited.detach(), "rb") as file:
            mapping = _map(file.fileno())
        return _Unpickler(mapping, self.begin, self.size).load()


class _Pickler(pickle.Pickler):
    """Pickles into `stream`, and writes tensors into a file instead.

    Attributes:
        tensors: {id of a tensor: (the tensor, where it lies in the file)}.
    """

    def __init__(self, file):
        self.file, self.end, self.stream = file, 0, BytesIO()
        self.tensors: dict[int, tuple[torch.Tensor, Location]] = {}
        super().__init__(self.stream, pickle.HIGHEST_PROTOCOL)

    def persistent_id(self, obj) -> Location | None:
        """Write a tensor into the file and return where it lies; return None to pickle the object itself."""
        if type(obj) is not torch.Tensor or not obj.is_cpu or not obj.numel():
            return None
        if id(obj) not in self.tensors:
            offset = self.write(obj.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
            self.tensors[id(obj)] = obj, (offset, obj.shape, obj.dtype)
        return self.tensors[id(obj)][1]

    def write(self, data: memoryview) -> int:
        """Append bytes to the file, at a multiple of ALIGNMENT; return where they begin. Raises OSError."""
        begin = self.file.seek(-(-self.end // ALIGNMENT) * ALIGNMENT)
        while data:  # one call writes at most 2 GiB
            data = data[self.file.write(data) :]
        self.end = self.file.tell()
        return begin


class _Unpickler(pickle.Unpickler):
    """Unpickles what _Pickler wrote; tensors are parts of the mapping of its file."""

    def __init__(self, mapping: mmap.mmap, begin: int, size: int):
        self.mapping = mapping
        super().__init__(BytesIO(mapping[begin : begin + size]))

    def persistent_load(self, location: Location) -> torch.Tensor:
        """Return the tensor at a location of the file."""
        return _mapped_tensor(self.mapping, location)


def _map(descriptor: int) -> mmap.mmap:
    """Map a whole file, so that writing changes a private copy: torch takes only memory it may write to."""
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)


def _mapped_tensor(mapping: mmap.mmap, location: Location) -> torch.Tensor:
    offset, shape, dtype = location
    return torch.frombuffer(mapping, dtype=dtype, count=shape.numel(), offset=offset).view(shape)
