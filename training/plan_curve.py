"""Memory against the context or the batch, as a picture and as text: plan.py --curve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from files.atomic_writes import stage_files
from launch.memory import GIB

WIDTH = 79  # columns of the text
MORE_VALUES = 3  # above the smallest, if not even that fits
MOST_OVER_LIMIT = 1.25  # the end of the text's scale: what exceeds it is cut off, or the rest would be small


@dataclass(frozen=True)
class MemoryCurve:
    """The peak memory of a GPU at several values of an option.

    Attributes:
        title: the model, the method and the machine.
        label: what is varied, with its unit: "context, tokens".
        points: (value, GiB), ascending.
        limit_gib: what a GPU has.
    """

    title: str
    label: str
    points: list[tuple[int, float]]
    limit_gib: float

    @property
    def top(self) -> float:
        """GiB at the end of the scale."""
        return min(max(self.limit_gib, *(gib for _, gib in self.points)), MOST_OVER_LIMIT * self.limit_gib)

    def fits(self, gib: float) -> bool:
        """Whether a GPU has so much."""
        return gib <= self.limit_gib


def trace_peak(
    peak: Callable[[int], float], start: int, limit_gib: float, most: int
) -> list[tuple[int, float]]:
    """Return (value, GiB) at start, 2 * start, 4 * start, ... up to the first value over the limit.

    If that is `start`, MORE_VALUES follow, since a point is no curve.

    Args:
        peak: peak(value) returns the bytes that a run takes of a GPU.
        start: the smallest value.
        limit_gib: what a GPU has.
        most: the largest value to try.
    """
    points = [(start, peak(start) / GIB)]
    over = points[0][1] > limit_gib
    while (points[-1][1] <= limit_gib or (over and len(points) <= MORE_VALUES)) and points[-1][0] * 2 <= most:
        value = 2 * points[-1][0]
        points.append((value, peak(value) / GIB))
    return points


def draw_text(curve: MemoryCurve) -> str:
    """Return the curve as lines of at most WIDTH columns: a bar for each value, and a column at the limit.

    A bar over the limit is of another character, and ends in > if it is cut off.
    """
    values = [f"{value:,}" for value, _ in curve.points]
    head, _, unit = curve.label.partition(", ")
    value_width = max(map(len, [*values, unit or head]))
    sizes = [f"{gib:.2f}" for _, gib in curve.points]
    size_width = max(map(len, [*sizes, "GiB"]))
    columns = WIDTH - value_width - size_width - len("   |") - len(" too much")
    at_limit = round(curve.limit_gib / curve.top * (columns - 1))
    lines = [curve.title, f"{unit or head:>{value_width}}  {'GiB':>{size_width}}"]
    for value, size, (_, gib) in zip(values, sizes, curve.points, strict=True):
        length = min(round(gib / curve.top * columns), columns)
        bar = [*("=" if curve.fits(gib) else "#") * length, *" " * (columns - length)]
        if gib > curve.top:
            bar[-1] = ">"
        bar[at_limit] = "|"
        verdict = "" if curve.fits(gib) else " too much"
        lines.append(f"{value:>{value_width}}  {size:>{size_width}} |{''.join(bar)}{verdict}".rstrip())
    start = value_width + size_width + len("   |") + at_limit
    note = f"^ {curve.limit_gib:.2f} GiB per GPU"
    # On the left of its column where the right has no room.
    if start + len(note) > WIDTH:
        note = f"{curve.limit_gib:.2f} GiB per GPU ^"
        start -= len(note) - 1
    return "\n".join([*lines, " " * start + note])


def draw_picture(curve: MemoryCurve, path: Path) -> None:
    """Write the curve with the limit as a line, in the format that the file's end names. Raises OSError."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    values, sizes = zip(*curve.points, strict=True)
    axes.plot(values, sizes, "o-", color="#1f5fa8", linewidth=1.5, markersize=5, label="predicted peak")
    over = [point for point in curve.points if not curve.fits(point[1])]
    if over:
        axes.plot(*zip(*over, strict=True), "o", color="#b0243c", markersize=6, label="too much")
    axes.axhline(curve.limit_gib, color="#b06a00", linestyle="--", label=f"GPU: {curve.limit_gib:.2f} GiB")
    for point in curve.points:
        label = f"{point[1]:.1f}"
        axes.annotate(label, point, (-4, 5), textcoords="offset points", ha="right", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.minorticks_off()
    axes.set(xlabel=curve.label, ylabel="GiB per GPU", title=curve.title)
    axes.set_ylim(0, 1.1 * max(curve.limit_gib, *sizes))
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", fontsize=8)
    try:
        with stage_files(path.parent) as stage:
            figure.savefig(stage(path.name), dpi=120, format=path.suffix[1:].lower())
    finally:
        plt.close(figure)
