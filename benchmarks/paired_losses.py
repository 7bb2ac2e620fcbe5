"""Differences between losses of runs with the same seed, and tables of them."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass

# Student's t at 97.5%, by degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Losses = dict[str, dict[int, float]]  # {series: {seed: loss}}


@dataclass(frozen=True)
class Difference:
    """A mean difference of losses.

    Attributes:
        name: what is compared.
        mean: of the differences.
        low, high: the 95% interval of the mean, by Student's t; None with a single difference.
        count: number of differences.
    """

    name: str
    mean: float
    low: float | None
    high: float | None
    count: int


def mean_difference(name: str, differences: list[float]) -> Difference:
    """Return the mean of independent differences with its 95% interval; there must be at least one."""
    count, mean = len(differences), statistics.mean(differences)
    if count == 1:
        return Difference(name, mean, None, None, count)
    margin = T_QUANTILES[count - 2] * statistics.stdev(differences) / math.sqrt(count)
    return Difference(name, mean, mean - margin, mean + margin, count)


def compare(losses: Losses, pairs: list[tuple[str, str]], baseline: str) -> list[Difference]:
    """Return the differences between series of the same seed, and how far two seeds of one differ.

    Args:
        losses: of all series.
        pairs: (series, series to subtract) to compare, without those that share no seed.
        baseline: the series whose seeds are compared.
    """

    def paired(name: str, less: str) -> list[float]:
        """Return the differences of the seeds that both series have."""
        return [loss - losses[less][seed] for seed, loss in losses[name].items() if seed in losses[less]]

    found = [
        mean_difference(f"{name} - {less}, same seed", paired(name, less))
        for name, less in pairs
        if paired(name, less)
    ]
    between = [abs(a - b) for a, b in itertools.combinations(losses[baseline].values(), 2)]
    if between:  # its pairs share seeds, so there is no interval of their mean
        name = f"{baseline}, size of the difference between two seeds"
        found.append(Difference(name, statistics.mean(between), None, None, len(between)))
    return found


def format_tables(losses: Losses, differences: list[Difference]) -> str:
    """Return the losses by seed, and the differences, as Markdown tables."""
    lines = [["seed", *losses], ["---"] * (1 + len(losses))]
    for seed in sorted({seed for by_seed in losses.values() for seed in by_seed}):
        found = [by_seed.get(seed) for by_seed in losses.values()]
        lines.append([str(seed), *("" if loss is None else f"{loss:.5f}" for loss in found)])
    tables = ["".join(f"| {' | '.join(line)} |\n" for line in lines)]
    lines = [["held-out loss", "mean", "95% interval", "number"], ["---"] * 4]
    for each in differences:
        interval = "" if each.low is None else f"{each.low:+.5f} to {each.high:+.5f}"
        lines.append([each.name, f"{each.mean:+.5f}", interval, str(each.count)])
    tables.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(tables)
