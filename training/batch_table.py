"""The peak of a run with several batches and contexts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launch.memory import GIB
from monitoring.memory_model import MemoryEstimate
from training.machine import Machine, fits

LARGEST_BATCH = 4096  # that is tried
SHORTEST_CONTEXT = 512  # tokens of the first column, unless rows must be shorter


@dataclass(frozen=True)
class BatchTable:
    """The peaks of a run with several batch sizes and contexts.

    Attributes:
        contexts: tokens of the columns.
        batches: rows per micro-batch and GPU, of the lines.
        peaks: GiB on the fullest rank, a list per line.
        fits: whether that fits, in the same order.
    """

    contexts: list[int]
    batches: list[int]
    peaks: list[list[float]]
    fits: list[list[bool]]


def make_batch_table(
    estimate: Callable[[int, int], MemoryEstimate], machine: Machine, longest: int, limit: int, least: int = 1
) -> BatchTable:
    """Return the table, up to the first batch that fits with no context.

    Args:
        estimate: estimate(batch, tokens) returns the memory of the run.
        machine: the GPUs.
        longest: tokens of the longest row that fits. Columns go on to the next power of two,
        limit: unless that is more than the model is made for.
        least: tokens of a row at least.
    """
    shortest = min(SHORTEST_CONTEXT, 2 ** (longest.bit_length() - 1))
    shortest = max(shortest, least)
    contexts = [2**i for i in range(31) if shortest <= 2**i <= min(limit, 2 * longest)]
    table = BatchTable(contexts, [], [], [])
    batch = 1
    while batch <= LARGEST_BATCH and (batch == 1 or any(table.fits[-1])):
        line = [estimate(batch, tokens) for tokens in contexts]
        table.batches.append(batch)
        table.peaks.append([each.peak / GIB for each in line])
        table.fits.append([fits(each, machine) for each in line])
        batch *= 2
    return table
