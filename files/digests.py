"""Digests by which the weights of a model are recognised.

Only a few rows of each weight are read, so that a model of any size takes seconds. They are read as bytes,
whatever file holds a tensor. A change that touches none of the sampled rows is not seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from files.bnb_weights import BnbWeight
from files.model_folder import CheckpointFiles
from files.tensors import StoredTensor

SMALL = 2**20  # bytes of a weight that is read whole where extra rows are read
SMALL_PART = 2**14  # bytes of a part of a packed weight that is read whole

Reader = Callable[[str, int, int], bytes]  # (file, first byte, bytes) -> the bytes


@dataclass(frozen=True)
class Contents:
    """Digests of all weights of a model. Results and checkpoints hold them as one text.

    plain: digest of the weights that are not packed.
    packed: digest of the codes and scales of those that bitsandbytes packed; None if there are none.
    """

    plain: str
    packed: str | None = None

    def text(self) -> str:
        return self.plain if self.packed is None else f"{self.plain}-{self.packed}"

    @staticmethod
    def parse(text: str) -> Contents:
        """The digests in a text that `text` made."""
        plain, dash, packed = text.partition("-")
        return Contents(plain, packed if dash else None)

    def comparable_with(self, other: Contents) -> bool:
        """Whether both models hold 4-bit weights, or neither does: else even alike weights would differ."""
        return (self.packed is None) == (other.packed is None)


def digest_rows_of(files: CheckpointFiles, names: list[str], extra_rows: int = 0) -> str:
    """Digest of weights that are not packed: name, shape and dtype of each, its first, middle and last row.

    Checkpoints hold the digest without extra rows, so it must stay as it is.

    Args:
        names: of the weights, all in files.tensors.
        extra_rows: how many more rows of each weight to read, at places that its name decides. Weights of at
            most SMALL bytes are then read whole.

    Raises OSError for a file that cannot be read.
    """
    total = hashlib.sha256()
    with _reading(files.folder) as read:
        for name in sorted(names):
            stored = files.tensors[name]
            total.update(f"{name} {stored.shape} {stored.dtype}".encode())
            count, row = _rows(stored)
            random = hashlib.shake_256(name.encode()).digest(8 * extra_rows)
            places = {int.from_bytes(random[i : i + 8]) % count for i in range(0, 8 * extra_rows, 8)}
            row_ranges = [(i, 1) for i in sorted(places | {0, count // 2, count - 1})]
            if extra_rows and count * row <= SMALL:
                row_ranges = [(0, count)]
            for first, rows in row_ranges:
                total.update(read(stored.file, stored.begin + first * row, rows * row))
    return total.hexdigest()


def digest_contents(files: CheckpointFiles) -> Contents:
    """Digests of all weights of a model: `digest_rows_of` those that are not packed, and the like of those
    that bitsandbytes packed. Raises OSError."""
    packed = {name: weight for name, weight in files.packed.items() if isinstance(weight, BnbWeight)}
    plain = digest_rows_of(files, [name for name in files.tensors if name not in packed])
    return Contents(plain, _digest_packed(files.folder, packed) if packed else None)


def _digest_packed(folder: Path, weights: dict[str, BnbWeight]) -> str:
    """Digest of the shape and offset of each weight, and of bytes of each of its parts: those of the first,
    middle and last row, or all of a small part."""
    total = hashlib.sha256()
    with _reading(folder) as read:
        for name, weight in sorted(weights.items()):
            total.update(f"{name} {weight.shape} {weight.state.get('nested_offset')}".encode())
            rows = weight.shape[0]
            for suffix, stored in sorted(weight.parts.items()):
                nbytes = math.prod(_rows(stored))
                total.update(f"{suffix} {nbytes}".encode())
                sampled = (0, rows // 2, rows - 1)
                byte_ranges = [(i * nbytes // rows, -(-(i + 1) * nbytes // rows)) for i in sampled]
                if nbytes <= SMALL_PART:
                    byte_ranges = [(0, nbytes)]
                for begin, end in byte_ranges:
                    total.update(read(stored.file, stored.begin + begin, end - begin))
    return total.hexdigest()


def _rows(stored: StoredTensor) -> tuple[int, int]:
    """(rows, bytes of a row) of a tensor; a number by itself is a row."""
    count = stored.shape[0] if stored.shape else 1
    return count, math.prod(stored.shape[1:]) * stored.torch_dtype.itemsize


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[Reader]:
    """Gives a Reader that opens each file once: a model has few files, of which many small parts are read."""
    descriptors: dict[str, int] = {}

    def read(file: str, begin: int, nbytes: int) -> bytes:
        if file not in descriptors:
            descriptors[file] = os.open(folder / file, os.O_RDONLY)
            opened.callback(os.close, descriptors[file])
        found = os.pread(descriptors[file], nbytes, begin)
        if len(found) < nbytes:
            raise OSError(f"{folder / file} was cut while it was read")
        return found

    with contextlib.ExitStack() as opened:
        yield read
