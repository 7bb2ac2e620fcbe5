"""The curves of several runs, as data that compare.js draws.

A curve is a list of rows [step, tokens, seconds, count, mean, lowest, highest]. A row sums up `count` steps;
the first three numbers are the totals after the last of them. A row of one step ends at its value, the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from monitoring.run_summary import is_finite

MAX_ROWS = 400  # of a curve
WINDOWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # steps that the page can smooth over; 1 = not at all

Row = list[float]


@dataclass(frozen=True)
class Plot:
    """A chart with a curve of each run.

    Attributes:
        column: the field of metrics.jsonl.
        has_zero: whether a linear y axis includes 0.
        is_noisy: whether the page smooths it.
    """

    column: str
    title: str
    unit: str
    has_zero: bool = True
    is_noisy: bool = False


PLOTS = (
    Plot("loss", "Training loss", "nats per learned token", has_zero=False, is_noisy=True),
    Plot("eval_loss", "Evaluation loss", "nats per learned token", has_zero=False),
    Plot("router_aux_loss", "Auxiliary loss of routers", "before its factor", is_noisy=True),
    Plot("lr", "Learning rate", ""),
    Plot("grad_norm", "Gradient norm", "before clipping", is_noisy=True),
    Plot("tokens_per_second", "Speed", "tokens/s, all ranks", is_noisy=True),
    Plot("memory_allocated_gib", "Memory", "GiB, fullest rank"),
)


def make_curves(steps: list[dict]) -> dict[str, list[Row]]:
    """Return {column: curve} of those PLOTS for which a run has values. steps: lines of metrics.jsonl."""
    tokens, seconds = ([*accumulate(_amount(s, name) for s in steps)] for name in ("tokens", "step_seconds"))
    totals = [(s["step"], t, round(x, 3)) for s, t, x in zip(steps, tokens, seconds, strict=True)]
    curves = {}
    for plot in PLOTS:
        points = [
            (total, s[plot.column])
            for total, s in zip(totals, steps, strict=True)
            if is_finite(s.get(plot.column))
        ]
        if points:
            curves[plot.column] = _group(points)
    return curves


def choose_window(longest: int) -> int:
    """Return the index in WINDOWS of the smoothing to begin with. longest: most steps of a run."""
    if longest < 40:  # single steps show the trend
        return 0
    return max(i for i, window in enumerate(WINDOWS) if window <= max(5, longest // 50))


def _amount(step: dict, name: str) -> float:
    return step[name] if is_finite(step.get(name)) else 0


def _group(points: list[tuple[tuple, float]]) -> list[Row]:
    """Return at most MAX_ROWS rows for (totals, value) of each step: the first step, then equal groups."""
    size = -(-(len(points) - 1) // (MAX_ROWS - 1)) or 1
    groups = [points[:1], *(points[i : i + size] for i in range(1, len(points), size))]
    return [_sum_up(group) for group in groups]


def _sum_up(group: list[tuple[tuple, float]]) -> Row:
    values = [value for _, value in group]
    row = [*group[-1][0], len(values), _round(sum(values) / len(values))]
    return row if len(values) == 1 else [*row, _round(min(values)), _round(max(values))]


def _round(value: float) -> float:
    return float(f"{value:.6g}")
