"""safetensors files: where their tensors lie, reading one, and writing a file.

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
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "I64"}  # which no weights are
PIECE, PIECES = 16 * 2**20, 8  # bytes of a piece, and how many of them are read ahead of a GPU
BLOCK = 4  # pieces that are allocated at once: 64 MiB, which torch gives to checkpoints' copies afterwards
MOST_WRITTEN = os.sysconf("SC_IOV_MAX")  # tensors in a call
# The process's mask can only be read by setting it, which threads must not do at once: so once, at import.
UMASK = os.umask(0)
os.umask(UMASK)


class HasShape(Protocol):
    """A tensor, or what describes one."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of a tensor. file: its name in its folder, or the whole path of one
    elsewhere; dtype: safetensors' name where it is none of DTYPES; begin: its first byte in the file."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    begin: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype, which must be one of DTYPES."""
        assert isinstance(self.dtype, torch.dtype), f"{self.dtype} cannot be read"
        return self.dtype

    def elements(self, first: int, count: int) -> StoredTensor:
        """The part of it that `count` elements from `first` on are, as a 1-D tensor."""
        begin = self.begin + first * self.torch_dtype.itemsize
        return dataclasses.replace(self, shape=(count,), begin=begin)


def read_header(path: Path) -> tuple[dict, int]:
    """(the header, where the data begins)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def write_header(
    out: BinaryIO, tensors: Mapping[str, HasShape], metadata: dict[str, str] | None = None
) -> int:
    """Of a file in which these tensors follow in this order. Returns how many bytes they are."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    out.write(struct.pack("<Q", len(raw)) + raw)
    return end


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """What a file holds. The safetensors library reads the header first, and refuses one that is not sound:
    raises SafetensorError or OSError."""
    with safe_open(path, framework="pt"):
        header, start = read_header(path)
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path.name,
            tuple(t["shape"]),
            DTYPES.get(t["dtype"], t["dtype"]),
            start + t["data_offsets"][0],
        )
        for name, t in header.items()
    }


class Stage:
    """Page-locked memory through which one thread's tensors go from files to a GPU, piece by piece. In memory
    of their own the system would clear new pages for each of them, which takes longer than reading into old
    ones, and a GPU copies slowly from what is not page-locked."""

    def __init__(self, device_type: str):
        block = torch.empty(BLOCK, PIECE, dtype=torch.uint8, device="meta")
        blocks = [empty_on_host(block, device_type) for _ in range(0, PIECES, BLOCK)]
        # The event: the piece may be overwritten. Who waits for it sleeps, and leaves the processor to the
        # readers.
        pieces = [(piece, torch.cuda.Event(blocking=True)) for block in blocks for piece in block]
        self.pieces = pieces[:PIECES]


class Staged:
    """A tensor of which as much is read as the stage holds. Must be moved before the stage is used for
    another."""

    def __init__(self, folder: Path, stored: StoredTensor, stage: Stage):
        self.stored, self.pieces = stored, _read_pieces(folder, stored, stage)
        self.ahead = list(islice(self.pieces, PIECES))

    def to(self, device: torch.device) -> torch.Tensor:
        """The tensor, copied on the current stream while the rest of it is read. Raises OSError."""
        tensor = torch.empty(self.stored.shape, dtype=self.stored.torch_dtype, device=device)
        for begin, piece, copied in chain(self.ahead, self.pieces):
            _flat(tensor)[begin : begin + PIECE].copy_(piece, non_blocking=True)
            copied.record()
        return tensor


def _read_pieces(folder: Path, stored: StoredTensor, stage: Stage) -> Iterator[tuple]:
    """(where in the tensor, the bytes, the event to record when they have been copied) of each piece in
    turn."""
    size = math.prod(stored.shape) * stored.torch_dtype.itemsize
    with (folder / stored.file).open("rb", buffering=0) as file:
        file.seek(stored.begin)
        for begin, (piece, copied) in zip(range(0, size, PIECE), cycle(stage.pieces)):
            copied.synchronize()
            _read_into(piece[: size - begin], file)
            yield begin, piece[: size - begin], copied


@overload
def read_tensor(folder: Path, stored: StoredTensor, stage: None = None) -> torch.Tensor: ...
@overload
def read_tensor(folder: Path, stored: StoredTensor, stage: Stage | None) -> torch.Tensor | Staged: ...
def read_tensor(folder: Path, stored: StoredTensor, stage: Stage | None = None) -> torch.Tensor | Staged:
    """A tensor, on the CPU, read into memory of its own: a mapped file would count as the process's memory
    for as long as it is open, and opening it for each tensor would parse its header each time. With a stage,
    one on its way to a GPU. Raises OSError."""
    if stage:
        return Staged(folder, stored, stage)
    tensor = torch.empty(stored.shape, dtype=stored.torch_dtype)
    with (folder / stored.file).open("rb", buffering=0) as file:
        file.seek(stored.begin)
        _read_into(_flat(tensor), file)
    return tensor


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _read_into(memory: torch.Tensor, file: FileIO) -> None:
    left = memory.numpy().data
    while left:
        done = file.readinto(left)
        if not done:
            raise OSError(f"{file.name} was cut while it was read")
        left = left[done:]


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a file. safetensors makes it readable by its owner only; here those who may read the other files
    of the folder may read this one too. Raises OSError."""
    try:
        save_file(tensors, path, metadata={"format": "pt"} | (metadata or {}))
    except SafetensorError as e:  # the library's only one, for every failure to write
        number = re.search(r"os error (\d+)", str(e))  # of Rust's, by which a full disk is known
        raise OSError(*map(int, number.groups() if number else ()), str(e)) from None
    path.chmod(0o666 & ~UMASK)


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """The same for a thread beside the one that trains, which has the interpreter while tensors are written,
    hundreds at a time: the library holds it for a tenth of a second while it looks at some thousand of them,
    and for whoever lets it go for each one, the other is woken as often. All on the CPU."""
    # Widest first, so that each lies where its dtype can be read.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header = BytesIO()
    write_header(header, ordered)
    # In one list: a disk that is nearly full may take a part of any of them.
    left = [header.getbuffer(), *(_flat(tensor.contiguous()).numpy().data for tensor in ordered.values())]
    begin = 0
    with path.open("wb", buffering=0) as file:
        while begin < len(left):
            written = os.writev(file.fileno(), left[begin : begin + MOST_WRITTEN])
            while begin < len(left) and written >= len(left[begin]):
                written -= len(left[begin])
                begin += 1
            if written:
                left[begin] = left[begin][written:]
