"""Gather rows of a table in page-locked host memory: the GPU reads them itself in one Triton kernel.

Only the requested rows are transferred, and the host does not wait for the indices.
Imported only where there is a GPU that Triton supports.

Shapes: N tokens, S rows of the table, H hidden features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # features of a program


# Copies up to BLOCK features of one token's row to out, or zeros; arguments as for `gather_rows`.
@triton.jit
def _gather(table, index, mask, out, features, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wanted = columns < features
    if HAS_MASK:
        wanted = wanted & tl.load(mask + token)
    row = tl.load(table + tl.load(index + token) * features + columns, wanted, 0.0)
    tl.store(out + token * features + columns, row, columns < features)


def gather_rows(table: torch.Tensor, index: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return table[index], with zeros where the mask is False: [N, H] on the GPU of `index`.

    Args:
        table: [S, H] in pinned host memory.
        index: [N] int64.
        mask: [N] bool; None: all True.
    """
    out = torch.empty(len(index), table.shape[1], dtype=table.dtype, device=index.device)
    if len(index):
        grid = (len(index), triton.cdiv(table.shape[1], BLOCK))
        mask_or_any = index if mask is None else mask  # the kernel needs a pointer, and does not read it
        _gather[grid](table, index, mask_or_any, out, table.shape[1], HAS_MASK=mask is not None, BLOCK=BLOCK)
    return out
