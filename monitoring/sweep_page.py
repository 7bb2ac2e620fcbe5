"""sweep.html: the trials of a sweep on one page, for a browser."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from monitoring.page import render
from monitoring.report_charts import Axis, Points, linear_axis, log_axis, number, step_axis
from options.sweep import SweepOptions
from options.sweep_space import Range, Space, Values

PAGE = "sweep.html"
HEIGHT = 200  # pixels of a chart
MAX_LABELS = 6  # of values on an axis
MAX_LABEL = 14  # characters of one


@dataclass(frozen=True)
class TrialRow:
    """A trial.

    Attributes:
        number: from 0.
        state: complete, pruned, failed, running, or paused: a sweep that was stopped has let go of it.
        loss: evaluation loss; of a pruned trial its last one; None if it has none.
        options: its values, as on a command line.
        losses: the losses of its folds.
        seconds: from its first start to its end, pauses included; None until it has ended.
        reason: why it was stopped, or failed; or "".
        report: its report.html, relative to the sweep's folder, or that of its first fold; "" = none yet.
    """

    number: int
    state: str
    loss: float | None
    options: dict[str, str]
    losses: tuple[float, ...]
    seconds: float | None
    reason: str
    report: str


@dataclass(frozen=True)
class SweepPage:
    """What sweep.html shows.

    Attributes:
        folder: the sweep's folder.
        space: what trials differ in.
        rows: the trials, the best first.
        trials: number of trials of the whole sweep.
        sweep: its options.
        importances: {option: share}, the largest first; {} if there are too few trials.
    """

    folder: Path
    space: Space
    rows: list[TrialRow]
    trials: int
    sweep: SweepOptions
    importances: dict[str, float]

    @property
    def best(self) -> TrialRow | None:
        """The complete trial with the lowest loss."""
        return next((row for row in self.rows if row.state == "complete"), None)

    def count(self, state: str) -> int:
        """Return the number of trials in a state."""
        return sum(row.state == state for row in self.rows)

    @property
    def ended(self) -> int:
        """Number of trials that have ended."""
        return len(self.rows) - self.count("running") - self.count("paused")


@dataclass(frozen=True)
class Dot:
    """A trial in a chart: its position in percent and pixels, its style, and its text when pointed at."""

    x: float
    y: float
    style: str
    note: str


@dataclass(frozen=True)
class Scatter:
    """A chart of the trials' losses over an option or over the trials.

    Attributes:
        title, unit: its heading.
        x: labels of the x axis at shares of it.
        y: the axis of the losses.
        dots: the trials.
        steps: the lowest loss so far, as (percent, pixels) from trial to trial; [] for none.
    """

    title: str
    unit: str
    x: list[tuple[float, str]]
    y: Axis
    dots: list[Dot]
    steps: Points

    @property
    def height(self) -> int:
        """Pixels of the plot."""
        return HEIGHT


def render_sweep(page: SweepPage) -> str:
    """Return sweep.html as text."""
    return render(
        "sweep.html.j2",
        title=f"Sweep · {page.folder.name}",
        page=page,
        headline=_headline(page),
        charts=_charts(page),
        names=page.space.names,
        space=[(each.name, _describe(each)) for each in page.space.dimensions],
    )


def _describe(dimension: Values | Range) -> str:
    """Return the values or the range of an option in words."""
    if isinstance(dimension, Values):
        return ", ".join(dimension.texts)
    scale = ", log scale" if dimension.is_log else ""
    steps = f" in steps of {dimension.step:g}" if dimension.step else ""
    return f"{dimension.text(dimension.low)} to {dimension.text(dimension.high)}{steps}{scale}"


def _headline(page: SweepPage) -> list[tuple[str, str, str]]:
    """Return (name, value, note) of each tile at the top of the page."""
    best = page.best
    states = ["pruned", "failed", "running", *(["paused"] if page.count("paused") else [])]
    note = ", ".join(f"{page.count(state)} {state}" for state in states)
    tiles = [("Trials", f"{page.ended} of {page.trials}", note)]
    if best and best.loss is not None:
        tiles.insert(0, ("Best evaluation loss", f"{best.loss:.4f}", f"trial {best.number}"))
    folds = f", {page.sweep.folds} folds each" if page.sweep.folds > 1 else ""
    return [
        *tiles,
        ("Sampler", page.sweep.sampler, f"{'median pruning' if page.sweep.prune else 'no pruning'}{folds}"),
    ]


def _charts(page: SweepPage) -> list[Scatter]:
    """Return the losses over the trials, and over each option; [] without a loss."""
    rows = sorted((row for row in page.rows if row.loss is not None), key=lambda row: row.number)
    if not rows:
        return []
    losses = [row.loss for row in rows if row.loss is not None]
    y = linear_axis(losses, with_zero=False)
    if min(losses) > 0 and max(losses) > 20 * min(losses):  # a few trials diverged
        y = log_axis(losses)
    axis = step_axis(0, max(page.trials - 1, 1))
    positions = [axis.share(row.number) for row in rows]
    over_time = _scatter("Trials", "evaluation loss by trial", rows, positions, axis.labelled_ticks, y)
    charts = [replace(over_time, steps=_lowest(over_time.dots, rows))]
    for dimension in page.space.dimensions:
        labels, positions = _x_axis(dimension, [row.options[dimension.name] for row in rows])
        charts.append(_scatter(dimension.name, "evaluation loss by value", rows, positions, labels, y))
    return charts


def _x_axis(dimension: Values | Range, texts: list[str]) -> tuple[list[tuple[float, str]], list[float]]:
    """Return (labels of an option's axis at shares of it, the share of each of the values `texts`)."""
    if isinstance(dimension, Values):
        known = list(dimension.texts)
        share = {text: (i + 0.5) / len(known) for i, text in enumerate(known)}
        every = math.ceil(len(known) / MAX_LABELS)
        labels = [(share[t], t if len(t) <= MAX_LABEL else f"{t[: MAX_LABEL - 1]}…") for t in known[::every]]
        return labels, [share[text] for text in texts]
    ends = [dimension.low, dimension.high]
    axis = log_axis(ends) if dimension.is_log else linear_axis(ends, with_zero=False)
    return axis.labelled_ticks, [axis.share(float(text)) for text in texts]


def _scatter(
    title: str,
    unit: str,
    rows: list[TrialRow],
    positions: list[float],
    labels: list[tuple[float, str]],
    y: Axis,
) -> Scatter:
    """Return a chart of trials.

    Args:
        title, unit: its heading.
        rows: the trials.
        positions: the share of the x axis of each of them.
        labels: (share, label) of the x axis.
        y: the axis of the losses.
    """
    dots = []
    for row, position in zip(rows, positions, strict=True):
        assert row.loss is not None
        values = ", ".join(f"{name} {value}" for name, value in row.options.items())
        note = f"trial {row.number}, {row.state}: loss {number(row.loss)}; {values}"
        dots.append(
            Dot(round(100 * position, 2), round((1 - y.share(row.loss)) * HEIGHT, 1), row.state, note)
        )
    return Scatter(title, unit, labels, y, dots, [])


def _lowest(dots: list[Dot], rows: list[TrialRow]) -> Points:
    """Return (percent, pixels from the top) of the lowest loss so far: it steps down at complete trials."""
    points, lowest = list[tuple[float, float]](), -math.inf
    for dot in (dot for dot, row in zip(dots, rows, strict=True) if row.state == "complete"):
        if points:
            points.append((dot.x, lowest))
        lowest = max(lowest, dot.y)
        points.append((dot.x, lowest))
    return points
