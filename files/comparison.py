"""Comparison of two stored tensors, chunk by chunk, so that host memory does not grow with their size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from files.tensors import CHUNK_BYTES, StoredTensor, read_tensor

START_ELEMENTS = 4096  # compared with start_only
Located = tuple[Path, StoredTensor]  # a tensor and its folder


def same_values(a: Located, b: Located, start_only: bool = False) -> bool:
    """Return whether two tensors hold the same numbers, in any dtypes. NaN equals nothing. Raises OSError.

    start_only: compare only the first START_ELEMENTS elements, where most tensors that differ already do.
    """
    return a[1].shape == b[1].shape and all(
        torch.equal(*_promote(x, y)) for x, y in _read_chunks(a, b, start_only)
    )


def same_bytes(a: Located, b: Located, start_only: bool = False) -> bool:
    """Return whether two tensors are equal bit for bit. start_only: as for `same_values`. Raises OSError."""
    if a[1].dtype != b[1].dtype or a[1].shape != b[1].shape:
        return False
    chunks = _read_chunks(a, b, start_only)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in chunks)


def _promote(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)  # holds all values of both
    return x.to(dtype), y.to(dtype)


def _read_chunks(a: Located, b: Located, start_only: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the elements of both tensors in 1-D chunks of the same length."""
    count = math.prod(a[1].shape)
    if start_only:
        count = min(count, START_ELEMENTS)
    step = CHUNK_BYTES // max(stored.torch_dtype.itemsize for _, stored in (a, b))
    for first in range(0, count, step):
        chunk = first, min(step, count - first)
        yield read_tensor(a[0], a[1].flat_slice(*chunk)), read_tensor(b[0], b[1].flat_slice(*chunk))
