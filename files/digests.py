"""Digests by which the weights of a model are recognised: of a few rows of each, so that a model of any size is digested in
seconds.

What is sampled is read from the files as bytes, whatever file holds a tensor. A change that touches none of the sampled
rows is not seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from files.bnb_weights import BnbWeight
from files.model_folder import CheckpointFiles
from files.tensors import StoredTensor

SMALL = 2**20  # bytes of a weight that is read whole where rows are drawn
SMALL_PART = 2**14  # bytes of a part of a packed weight that is read whole

Reader = Callable[[str, int, int], bytes]  # (file, first byte, bytes) -> the bytes


def digest_rows_of(files: CheckpointFiles, names: list[str], drawn: int = 0) -> str:
    """Digest of weights that are not packed: the name, shape and dtype of each, and its first, middle and last row.
    Checkpoints hold it.

    Args:
        names: of the weights, all in files.tensors.
        drawn: further rows of each weight, at places that its name decides; all rows of one that is at most SMALL.

    Raises OSError for a file that cannot be read.
    """
    total = hashlib.sha256()
    with _reading(files.folder) as read:
        for name in sorted(names):
            stored = files.tensors[name]
            total.update(f"{name} {stored.shape} {stored.dtype}".encode())
            count, row = _rows(stored)
            random = hashlib.shake_256(name.encode()).digest(8 * drawn)
            places = {int.from_bytes(random[i : i + 8]) % count for i in range(0, 8 * drawn, 8)}
            runs = [(i, 1) for i in sorted(places | {0, count // 2, count - 1})]
            for first, rows in [(0, count)] if drawn and count * row <= SMALL else runs:
                total.update(read(stored.file, stored.begin + first * row, rows * row))
    return total.hexdigest()


def digest_contents(files: CheckpointFiles) -> str:
    """Digest of all weights of a model: `digest_rows_of` those that are not packed, and behind a dash, where some are
    packed by bitsandbytes, the same of their codes and scales. Raises OSError."""
    packed = {name: weight for name, weight in files.packed.items() if isinstance(weight, BnbWeight)}
    plain = digest_rows_of(files, [name for name in files.tensors if name not in packed])
    return f"{plain}-{_digest_packed(files.folder, packed)}" if packed else plain


def _digest_packed(folder: Path, weights: dict[str, BnbWeight]) -> str:
    """Digest of the shape and offset of each weight, and of each of its parts: what the first, middle and last row take
    of it, or all of a small one."""
    total = hashlib.sha256()
    with _reading(folder) as read:
        for name, weight in sorted(weights.items()):
            total.update(f"{name} {weight.shape} {weight.state.get('nested_offset')}".encode())
            rows = weight.shape[0]
            for suffix, stored in sorted(weight.parts.items()):
                nbytes = math.prod(_rows(stored))
                total.update(f"{suffix} {nbytes}".encode())
                runs = [(i * nbytes // rows, -(-(i + 1) * nbytes // rows)) for i in (0, rows // 2, rows - 1)]
                for begin, end in [(0, nbytes)] if nbytes <= SMALL_PART else runs:
                    total.update(read(stored.file, stored.begin + begin, end - begin))
    return total.hexdigest()


def _rows(stored: StoredTensor) -> tuple[int, int]:
    """(rows, bytes of a row) of a tensor; a number by itself is a row."""
    count = stored.shape[0] if stored.shape else 1
    return count, math.prod(stored.shape[1:]) * stored.torch_dtype.itemsize


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[Reader]:
    """Gives a Reader, which opens each file once: many small reads, in the files of a model, of which there are few."""
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
