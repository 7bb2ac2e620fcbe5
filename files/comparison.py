"""Comparison of two stored tensors, chunk by chunk, so that host memory does not grow with their size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from files.tensors import CHUNK_BYTES, StoredTensor, read_tensor

Located = tuple[Path, StoredTensor]  # a tensor and its folder


def same_values(a: Located, b: Located, max_elements: int | None = None) -> bool:
    """Return whether two tensors have one shape and equal (first `max_elements`) numbers, in any dtypes.

    max_elements: None = compare all. NaN equals nothing. Raises OSError.
    """
    return a[1].shape == b[1].shape and all(
        torch.equal(*_promote(x, y)) for x, y in _read_chunks(a, b, max_elements)
    )


def same_bytes(a: Located, b: Located, max_elements: int | None = None) -> bool:
    """Return whether two tensors have the same shape, dtype and bytes.

    max_elements: compare only the first ones; None = all. Raises OSError.
    """
    if a[1].dtype != b[1].dtype or a[1].shape != b[1].shape:
        return False
    chunks = _read_chunks(a, b, max_elements)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in chunks)


def _promote(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)  # holds all values of both
    return x.to(dtype), y.to(dtype)


def _read_chunks(
    a: Located, b: Located, max_elements: int | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield pairs of 1-D chunks, equal in length, of two tensors' (first `max_elements`) elements."""
    count = math.prod(a[1].shape)
    if max_elements is not None:
        count = min(count, max_elements)
    step = CHUNK_BYTES // max(stored.torch_dtype.itemsize for _, stored in (a, b))
    for first in range(0, count, step):
        chunk = first, min(step, count - first)
        yield read_tensor(a[0], a[1].flat_slice(*chunk)), read_tensor(b[0], b[1].flat_slice(*chunk))
