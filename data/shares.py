"""Shares of the sets of a mixture: how many rows of each an epoch has, and which.

An epoch of a mixture uses the largest set once, and of the others as many rows as their weights say. The rows
of a set come from an endless sequence of shuffled passes through it, which each epoch continues. So at the
end of every epoch no row of a set was used more than once more often than another one of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from data.rows import MixedSet
from options.errors import UserError
from options.limits import MAX_MIXED_ROWS


def count_rows_per_epoch(
    names: Sequence[str], sizes: Sequence[int], weights: Sequence[Fraction]
) -> list[int]:
    """Return the number of rows of each set in an epoch.

    The set with the most rows gives each of them once; of several such sets, that with the smallest weight.
    The others give the number nearest to their share, halves rounded up.

    Args:
        names: of the sets, for messages.
        sizes: number of rows of each set, at least 1.
        weights: of the sets, all positive.

    Raises UserError if a set would give no row, or an epoch would have more than MAX_MIXED_ROWS.
    """
    per_weight = max(Fraction(size) / w for size, w in zip(sizes, weights, strict=True) if size == max(sizes))
    counts = [math.floor(per_weight * weight + Fraction(1, 2)) for weight in weights]
    if 0 in counts:
        name = names[counts.index(0)]
        raise UserError(
            f"--dataset: the weight of {name} is too small: an epoch has no row of it; leave it out"
        )
    if sum(counts) > MAX_MIXED_ROWS:
        raise UserError(
            f"--dataset: an epoch that uses the largest set once would have {sum(counts):,} rows; at most"
            f" {MAX_MIXED_ROWS:,} are possible. Raise the weight of {names[sizes.index(max(sizes))]}"
        )
    return counts


def draw_epoch(sets: Sequence[MixedSet], seed: int, epoch: int) -> torch.Tensor:
    """Return the indices of the rows of an epoch, set after set: [rows of the epoch] int64.

    They follow from the arguments alone. A set's indices follow those of the set before it.
    """
    drawn, start = [], 0
    for i, each in enumerate(sets):
        first = epoch * each.per_epoch  # how far the epochs before this one are in the set's sequence
        passes = range(first // each.size, -(-(first + each.per_epoch) // each.size))
        # -1 and -2 are other streams, and epochs are not negative.
        seeds = (seed * 1_000_003 - 3 - (number * len(sets) + i) for number in passes)
        orders = [
            torch.randperm(each.size, generator=torch.Generator().manual_seed(s % 2**63)) for s in seeds
        ]
        skipped = first - passes.start * each.size
        drawn.append(start + torch.cat(orders)[skipped : skipped + each.per_epoch])
        start += each.size
    return torch.cat(drawn)
