"""Two stored tensors compared, a piece at a time, so that host memory does not grow with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from files.tensors import PIECE, StoredTensor, read_tensor

GLANCE = 4096  # elements of a first look
Located = tuple[Path, StoredTensor]  # its folder, and what the header says of it


def same_values(a: Located, b: Located, at_first: bool = False) -> bool:
    """Whether two tensors hold the same numbers, in whatever dtypes. NaN equals nothing. at_first: as for
    `same_bytes`. Raises OSError."""
    return a[1].shape == b[1].shape and all(
        torch.equal(*_promoted(x, y)) for x, y in _pieces(a, b, _count(a[1], at_first))
    )


def same_bytes(a: Located, b: Located, at_first: bool = False) -> bool:
    """Whether two tensors are the same bit for bit. at_first: only their first GLANCE elements, which tells
    most tensors that differ apart. Raises OSError."""
    if a[1].dtype != b[1].dtype or a[1].shape != b[1].shape:
        return False
    pieces = _pieces(a, b, _count(a[1], at_first))
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pieces)


def _count(stored: StoredTensor, at_first: bool) -> int:
    """Elements to be compared."""
    count = math.prod(stored.shape)
    return min(count, GLANCE) if at_first else count


def _promoted(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)  # holds all values of both
    return x.to(dtype), y.to(dtype)


def _pieces(a: Located, b: Located, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The first `count` elements of both, some at a time: 1-D."""
    step = PIECE // max(stored.torch_dtype.itemsize for _, stored in (a, b))
    for first in range(0, count, step):
        some = first, min(step, count - first)
        yield read_tensor(a[0], a[1].elements(*some)), read_tensor(b[0], b[1].elements(*some))
