"""Rows of a table in page-locked host memory, read by the GPU itself in one Triton kernel: nothing is copied but the
rows that are asked for, and the host does not wait to be told which.

Imported only where there is a GPU that Triton supports.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # features of a program


@triton.jit
def _gather(rows, index, here, out, features, HAS_HERE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wanted = at < features
    if HAS_HERE:
        wanted = wanted & tl.load(here + token)
    row = tl.load(rows + tl.load(index + token) * features + at, wanted, 0.0)
    tl.store(out + token * features + at, row, at < features)


def gather(rows: torch.Tensor, index: torch.Tensor, here: torch.Tensor | None) -> torch.Tensor:
    """[N, H] on the GPU of `index`, [N] int64: rows[index], zeros where not `here` [N] bool (None: everywhere). rows
    [S, H]: pinned."""
    out = torch.empty(len(index), rows.shape[1], dtype=rows.dtype, device=index.device)
    if len(index):
        grid = (len(index), triton.cdiv(rows.shape[1], BLOCK))
        flags = index if here is None else here
        _gather[grid](rows, index, flags, out, rows.shape[1], HAS_HERE=here is not None, BLOCK=BLOCK)
    return out
