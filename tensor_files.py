"""safetensors files: where their tensors lie, reading one, and writing a file.

Format: https://huggingface.co/docs/safetensors - 8 bytes of length, a JSON header, the raw tensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "U8": torch.uint8}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The process's mask can only be read by setting it, which threads must not do at once: so once, at import.
UMASK = os.umask(0)
os.umask(UMASK)


class HasShape(Protocol):
    """A tensor, or what describes one."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of a tensor. dtype: safetensors' name where it is none of DTYPES; begin: its first
    byte in the file."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    begin: int = 0


def read_header(path: Path) -> tuple[dict, int]:
    """(the header, where the data begins)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def write_header(out: BinaryIO, tensors: dict[str, HasShape], metadata: dict[str, str] | None = None) -> int:
    """Of a file in which these tensors follow in this order. Returns how many bytes they are."""
    header, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
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


def read_tensor(folder: Path, stored: StoredTensor) -> torch.Tensor:
    """A tensor, on the CPU, read into memory of its own: a mapped file would count as the process's memory for as
    long as it is open, and opening it for each tensor would parse its header each time. Raises OSError."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    left = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    with (folder / stored.file).open("rb", buffering=0) as file:
        file.seek(stored.begin)
        while left:
            done = file.readinto(left)
            if not done:
                raise OSError(f"{folder / stored.file} was cut while it was read")
            left = left[done:]
    return tensor


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a file. safetensors makes it readable by its owner only; here those who may read the other files of
    the folder may read this one too. Raises OSError."""
    try:
        save_file(tensors, path, metadata={"format": "pt"} | (metadata or {}))
    except SafetensorError as e:  # the library's only one, for every failure to write
        raise OSError(str(e)) from None
    path.chmod(0o666 & ~UMASK)
