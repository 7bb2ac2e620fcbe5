"""safetensors files: their headers, reading a tensor, and writing a file.

Format: https://huggingface.co/docs/safetensors - 8 bytes of length, a JSON header, the raw tensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO, FileIO
from itertools import chain, cycle, islice
from pathlib import Path
from typing import BinaryIO, Protocol, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from launch.memory import empty_on_host

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "U8": torch.uint8}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "I64"}  # int64: never weights
CHUNK_BYTES, CHUNK_COUNT = 16 * 2**20, 8  # size and number of the pinned chunks
CHUNKS_PER_BLOCK = 4  # allocated at once: 64 MiB, which torch reuses for the host copies of checkpoints
MAX_BUFFERS_PER_WRITE = os.sysconf("SC_IOV_MAX")
# The umask can only be read by setting it, which is not thread-safe. So it is read once, at import.
UMASK = os.umask(0)
os.umask(UMASK)


class HasShape(Protocol):
    """A tensor, or a description of one."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class StoredTensor:
    """A file header's description of a tensor.

    Attributes:
        file: name of the file in its folder, or the full path of a file elsewhere.
        shape: shape of the tensor.
        dtype: a dtype of DTYPES, or safetensors' name of another one.
        begin: offset of the tensor's first byte in the file.
    """

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    begin: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype, which must be one of DTYPES."""
        assert isinstance(self.dtype, torch.dtype), f"{self.dtype} cannot be read"
        return self.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element; other dtypes than those of DTYPES have their bits in safetensors' name."""
        if isinstance(self.dtype, torch.dtype):
            return self.dtype.itemsize
        bits = re.search(r"\d+", self.dtype)
        return int(bits[0]) // 8 if bits else 1

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.itemsize

    @property
    def note(self) -> str:
        """What messages add to the shape."""
        return ""

    def sources(self) -> tuple[StoredTensor, ...]:
        """Return the tensors in the files whose bytes this one is made of."""
        return (self,)

    def flat_slice(self, first: int, count: int) -> StoredTensor:
        """Describe the `count` elements from element `first` on, as a 1-D tensor."""
        begin = self.begin + first * self.torch_dtype.itemsize
        return dataclasses.replace(self, shape=(count,), begin=begin)


def read_header(path: Path) -> tuple[dict, int]:
    """Return (the header of a safetensors file, unchecked; the offset of its data in bytes)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def write_header(
    out: BinaryIO, tensors: Mapping[str, HasShape], metadata: dict[str, str] | None = None
) -> int:
    """Write the header of a safetensors file in which these tensors follow in this order.

    Returns the number of bytes that the tensors take.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        dtype = DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    out.write(struct.pack("<Q", len(raw)) + raw)
    return end


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name, from its header.

    The safetensors library checks the header first. Raises SafetensorError if it is damaged, and OSError.
    """
    with safe_open(path, framework="pt"):
        header, start = read_header(path)
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path.name, tuple(t["shape"]), DTYPES.get(t["dtype"], t["dtype"]), start + t["data_offsets"][0]
        )
        for name, t in header.items()
    }


class PinnedBuffers:
    """Page-locked buffers through which one thread streams tensors from files to a GPU, chunk by chunk.

    A new buffer for each tensor would be slower: the system would clear its pages, which takes longer than
    reading into old ones. A GPU copies slowly from memory that is not page-locked.
    """

    def __init__(self, device_type: str):
        block = torch.empty(CHUNKS_PER_BLOCK, CHUNK_BYTES, dtype=torch.uint8, device="meta")
        blocks = [empty_on_host(block, device_type) for _ in range(0, CHUNK_COUNT, CHUNKS_PER_BLOCK)]
        # After the event the chunk may be overwritten. blocking: a waiting thread sleeps, so that the CPU is
        # free for the readers.
        chunks = [(chunk, torch.cuda.Event(blocking=True)) for block in blocks for chunk in block]
        self.chunks = chunks[:CHUNK_COUNT]


class StreamedTensor:
    """A tensor whose first chunks are read into pinned buffers; `to` streams it to a device.

    Call `to` before the buffers are used for another tensor.
    """

    def __init__(self, folder: Path, stored: StoredTensor, buffers: PinnedBuffers):
        self.stored, self.chunks = stored, _read_chunks(folder, stored, buffers)
        self.prefetched = list(islice(self.chunks, CHUNK_COUNT))

    def to(self, device: torch.device) -> torch.Tensor:
        """Return the tensor on a device; the current stream copies while the rest is read. Raises OSError."""
        tensor = torch.empty(self.stored.shape, dtype=self.stored.torch_dtype, device=device)
        for begin, chunk, copied in chain(self.prefetched, self.chunks):
            _as_bytes(tensor)[begin : begin + CHUNK_BYTES].copy_(chunk, non_blocking=True)
            copied.record()
        return tensor


def _read_chunks(
    folder: Path, stored: StoredTensor, buffers: PinnedBuffers
) -> Iterator[tuple[int, torch.Tensor, torch.cuda.Event]]:
    """Yield (offset in the tensor, bytes, event to record after their copy) of each chunk in turn."""
    size = math.prod(stored.shape) * stored.torch_dtype.itemsize
    with (folder / stored.file).open("rb", buffering=0) as file:
        file.seek(stored.begin)
        for begin, (chunk, copied) in zip(range(0, size, CHUNK_BYTES), cycle(buffers.chunks)):
            copied.synchronize()
            _read_into(chunk[: size - begin], file)
            yield begin, chunk[: size - begin], copied


@overload
def read_tensor(folder: Path, stored: StoredTensor, buffers: None = None) -> torch.Tensor: ...
@overload
def read_tensor(
    folder: Path, stored: StoredTensor, buffers: PinnedBuffers | None
) -> torch.Tensor | StreamedTensor: ...
def read_tensor(
    folder: Path, stored: StoredTensor, buffers: PinnedBuffers | None = None
) -> torch.Tensor | StreamedTensor:
    """Read a tensor to the CPU, or start to stream it to a GPU if `buffers` are given. Raises OSError.

    The file is not mapped: an open mapping counts as the process's memory, and opening one for each tensor
    would parse the header each time.
    """
    if buffers:
        return StreamedTensor(folder, stored, buffers)
    tensor = torch.empty(stored.shape, dtype=stored.torch_dtype)
    with (folder / stored.file).open("rb", buffering=0) as file:
        file.seek(stored.begin)
        _read_into(_as_bytes(tensor), file)
    return tensor


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _read_into(memory: torch.Tensor, file: FileIO) -> None:
    """Fill `memory` from the file's current position. Raises OSError if the file ends before."""
    rest = memory.numpy().data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise OSError(f"{file.name} was cut while it was read")
        rest = rest[count:]


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, with the permissions that the umask leaves. Raises OSError.

    The safetensors library would make it readable by its owner only.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"} | (metadata or {}))
    except SafetensorError as e:  # raised for every failure to write
        number = re.search(r"os error (\d+)", str(e))  # Rust's text; the errno identifies a full disk
        raise OSError(*map(int, number.groups() if number else ()), str(e)) from None
    path.chmod(0o666 & ~UMASK)


def writev_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write CPU tensors to a safetensors file, without the GIL during the writes. Raises OSError.

    For a background thread. writev(2) takes hundreds of tensors per call. The safetensors library would hold
    the GIL for a tenth of a second to inspect some thousand tensors. Releasing it for each tensor would wake
    the training thread as often.
    """
    # Widest dtype first, so that each tensor is aligned for its dtype.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header = BytesIO()
    write_header(header, ordered)
    # A nearly full disk may take only part of any buffer, so the header is in the same list.
    buffers = [header.getbuffer(), *(_as_bytes(t.contiguous()).numpy().data for t in ordered.values())]
    begin = 0
    with path.open("wb", buffering=0) as file:
        while begin < len(buffers):
            written = os.writev(file.fileno(), buffers[begin : begin + MAX_BUFFERS_PER_WRITE])
            while begin < len(buffers) and written >= len(buffers[begin]):
                written -= len(buffers[begin])
                begin += 1
            if written:
                buffers[begin] = buffers[begin][written:]
