"""Add a low-rank product to a matrix in place, in one Triton kernel.

For [8192, 14336] and rank 64 it takes 0.154 ms on an H200, cuBLAS 0.194 ms, and a copy of the matrix, which
reads and writes as much, 0.112 ms (2026-12-01). Imported only where there is a GPU that Triton supports.

Shapes: T rows, N columns, R rank.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, RANKS = 128, 64, 64  # of a program's part


@triton.jit
def _add_product(
    total,
    a,
    b,
    n_rows,
    n_columns,
    a_stride,
    b_rank_stride,
    b_column_stride,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, r = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    is_row, is_column = row[:, None] < n_rows, column[None, :] < n_columns
    place = total + row[:, None] * n_columns + column[None, :]
    value = tl.load(place, is_row & is_column, 0.0).to(tl.float32)
    for first in tl.static_range(0, RANK, RANKS):
        inside = first + r < RANK
        left = tl.load(a + row[:, None] * a_stride + (first + r)[None, :], is_row & inside[None, :], 0.0)
        at = b + (first + r)[:, None] * b_rank_stride + column[None, :] * b_column_stride
        value = tl.dot(left, tl.load(at, inside[:, None] & is_column, 0.0), value)
    tl.store(place, value.to(total.dtype.element_ty), is_row & is_column)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a b to `total` in place and return it. The sum is rounded once.

    Args:
        total: [T, N] in 16 bits, contiguous.
        a: [T, R] in the same dtype, of any stride between its rows.
        b: [R, N] in the same dtype, of any strides.
    """
    rows, columns = total.shape
    _add_product[(triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS))](
        total,
        a,
        b,
        rows,
        columns,
        a.stride(0),
        b.stride(0),
        b.stride(1),
        RANK=a.shape[1],
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        RANKS=RANKS,
        num_warps=4,
    )
    return total
