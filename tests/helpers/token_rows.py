"""Rows of distinct tokens, and the contents that steps must have."""

from __future__ import annotations

from itertools import pairwise

import torch

from data.rows import IGNORE, TokenizedRows

# (rows, batch_size, accumulation, world)
SIZES = [(16, 2, 2, 2), (17, 2, 2, 2), (1, 4, 2, 3), (5, 1, 1, 8),
         (23, 3, 2, 4), (50, 4, 1, 2), (13, 1, 5, 1), (9, 2, 2, 2)]  # fmt: skip


def make_token_rows(count: int) -> TokenizedRows:
    """Return rows of 2 to 13 tokens; no token is 0 or repeated, so tokens identify their row."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(2, 14, (count,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(starts[-1])
    learned = torch.rand(total, generator=generator) < 0.6
    learned[starts[1:] - 1] = True
    return TokenizedRows(
        torch.arange(1, total + 1, dtype=torch.int32), learned, starts, (), (), torch.arange(1, len(starts))
    )


def expected(rows: TokenizedRows) -> dict[tuple, tuple]:
    """Return {tokens of a row: its targets}, computed token by token."""
    table = {}
    for start, end in pairwise(rows.starts.tolist()):
        ids, learned = rows.tokens[start:end].tolist(), rows.learned[start:end].tolist()
        nexts = [ids[i + 1] if learned[i + 1] else IGNORE for i in range(len(ids) - 1)]
        table[tuple(ids)] = (*nexts, IGNORE)
    return table


def assert_target_positions(step) -> None:
    """Check target_positions in each micro-batch.

    Each rank has its learned tokens first, no position twice, and all ranks have the same number of
    positions.
    """
    for batches in zip(*(rank_step.batches for rank_step in step), strict=True):
        learned = [(b.targets.flatten() != IGNORE).nonzero()[:, 0].tolist() for b in batches]
        for batch, positions in zip(batches, learned, strict=True):
            target_positions = batch.target_positions.tolist()
            assert len(target_positions) == len(set(target_positions)) == max(map(len, learned))
            assert target_positions[: len(positions)] == positions
