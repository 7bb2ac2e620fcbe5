"""Digests that recognise the weights of a model.

Only a few rows of each weight are read, so a model of any size takes seconds. They are read as bytes, so the
split into files does not matter. A change outside the sampled rows is not detected.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from files.bnb_weights import BnbWeight
from files.model_folder import CheckpointFiles
from files.tensors import StoredTensor

SMALL_WEIGHT_BYTES = 2**20  # with extra rows, weights up to this size are read in full
SMALL_PACKED_BYTES = 2**14  # tensors of a packed weight up to this size are read in full

Reader = Callable[[str, int, int], bytes]  # (file, first byte, number of bytes) -> the bytes


@dataclass(frozen=True)
class WeightsDigest:
    """Digests of all weights of a model. Results and checkpoints hold them as one text.

    Attributes:
        plain: digest of the weights that are not packed.
        packed: digest of the codes and scales of weights that bitsandbytes packed; None if there are none.
    """

    plain: str
    packed: str | None = None

    def text(self) -> str:
        """Return both digests as one text, for `parse`."""
        return self.plain if self.packed is None else f"{self.plain}-{self.packed}"

    @staticmethod
    def parse(text: str) -> WeightsDigest:
        """Return the WeightsDigest whose `text()` this is."""
        plain, dash, packed = text.partition("-")
        return WeightsDigest(plain, packed if dash else None)

    def is_comparable_with(self, other: WeightsDigest) -> bool:
        """Return whether both models hold 4-bit weights, or neither does; else the digests always differ."""
        return (self.packed is None) == (other.packed is None)


def digest_weight_rows(files: CheckpointFiles, names: list[str], extra_rows: int = 0) -> str:
    """Return a digest of unpacked weights: names, shapes, dtypes, first, middle, last and `extra_rows` rows.

    Checkpoints hold the digest without extra rows, so it must not change.

    Args:
        files: the model's folder.
        names: names of the weights, all in files.tensors.
        extra_rows: number of further rows of each weight to read, drawn with its name as the seed. Weights of
            at most SMALL_WEIGHT_BYTES are then read in full.

    Raises:
        OSError: a file cannot be read.
    """
    total = hashlib.sha256()
    with _open_reader(files.folder) as read:
        for name in sorted(names):
            stored = files.tensors[name]
            total.update(f"{name} {stored.shape} {stored.dtype}".encode())
            random = hashlib.shake_256(name.encode()).digest(8 * extra_rows)
            for source in stored.sources():
                count, row_bytes = _row_layout(source)
                drawn = {int.from_bytes(random[i : i + 8]) % count for i in range(0, 8 * extra_rows, 8)}
                row_ranges = [(i, 1) for i in sorted(drawn | {0, count // 2, count - 1})]
                if extra_rows and count * row_bytes <= SMALL_WEIGHT_BYTES:
                    row_ranges = [(0, count)]
                for first, rows in row_ranges:
                    total.update(read(source.file, source.begin + first * row_bytes, rows * row_bytes))
    return total.hexdigest()


def digest_weights(files: CheckpointFiles) -> WeightsDigest:
    """Return digests of a few rows of each weight of a model, packed or not, without vision parts.

    Raises OSError.
    """
    return _digest_weights(files, files.tensors.keys() - files.vision)


def digest_vision(files: CheckpointFiles) -> str:
    """Return a digest of a few rows of each weight of the vision parts; "" without any. Raises OSError."""
    return _digest_weights(files, files.vision).text() if files.vision else ""


def _digest_weights(files: CheckpointFiles, names: Set[str]) -> WeightsDigest:
    weights = {name: files.packed[name] for name in names & files.packed.keys()}
    packed = {name: weight for name, weight in weights.items() if isinstance(weight, BnbWeight)}
    plain = digest_weight_rows(files, [name for name in names if name not in packed])
    return WeightsDigest(plain, _digest_packed(files.folder, packed) if packed else None)


def _digest_packed(folder: Path, weights: dict[str, BnbWeight]) -> str:
    """Return a digest of a few rows of each weight that bitsandbytes packed. Raises OSError.

    It covers the shape and offset of each weight and, of each of its tensors, the bytes that belong to the
    weight's first, middle and last row, or all bytes if the tensor is small.
    """
    total = hashlib.sha256()
    with _open_reader(folder) as read:
        for name, weight in sorted(weights.items()):
            total.update(f"{name} {weight.shape} {weight.quant_state.get('nested_offset')}".encode())
            rows = weight.shape[0]
            for suffix, stored in sorted(weight.tensors.items()):
                nbytes = math.prod(_row_layout(stored))
                total.update(f"{suffix} {nbytes}".encode())
                sampled = (0, rows // 2, rows - 1)
                byte_ranges = [(i * nbytes // rows, -(-(i + 1) * nbytes // rows)) for i in sampled]
                if nbytes <= SMALL_PACKED_BYTES:
                    byte_ranges = [(0, nbytes)]
                for begin, end in byte_ranges:
                    total.update(read(stored.file, stored.begin + begin, end - begin))
    return total.hexdigest()


def _row_layout(stored: StoredTensor) -> tuple[int, int]:
    """Return (rows, bytes of a row) of a tensor; a scalar is one row."""
    count = stored.shape[0] if stored.shape else 1
    return count, math.prod(stored.shape[1:]) * stored.torch_dtype.itemsize


@contextlib.contextmanager
def _open_reader(folder: Path) -> Iterator[Reader]:
    """Yield read(file, begin, nbytes) for files of the folder, each opened once for many small samples."""
    descriptors: dict[str, int] = {}

    def read(file: str, begin: int, nbytes: int) -> bytes:
        """Read bytes of a file. Raises OSError."""
        if file not in descriptors:
            descriptors[file] = os.open(folder / file, os.O_RDONLY)
            stack.callback(os.close, descriptors[file])
        data = os.pread(descriptors[file], nbytes, begin)
        if len(data) < nbytes:
            raise OSError(f"{folder / file} was cut while it was read")
        return data

    with contextlib.ExitStack() as stack:
        yield read
