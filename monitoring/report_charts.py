"""Data and axes of the charts in report.html and memory.html, which templates/charts.html.j2 draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

LEGEND_HEIGHT = 20  # pixels of a legend's line
TOP = 8  # pixels above the highest value

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        points: (step or seconds, value), in order; only finite values.
        style: its class in page.css: "main", "faint" or "second".
        has_dots: whether each point gets a mark.
    """

    name: str
    points: Points
    style: str = "main"
    has_dots: bool = False


@dataclass(frozen=True)
class Band:
    """A coloured interval of the x axis, in its units; page.css has a class for each name."""

    name: str
    start: float
    end: float
    note: str  # a browser shows it when the band is pointed at


@dataclass(frozen=True)
class Axis:
    """A scale from the value `low` to the value `high`.

    Attributes:
        ticks: the values that get a grid line and a label.
        labels: a text for each tick.
        is_log: whether the scale is logarithmic.
    """

    low: float
    high: float
    ticks: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    is_log: bool = False

    def share(self, value: float) -> float:
        """Return the position of a value: 0 at the low end, 1 at the high end."""
        position, low, high = (math.log10(v) if self.is_log else v for v in (value, self.low, self.high))
        return (position - low) / (high - low)

    @property
    def labelled_ticks(self) -> list[tuple[float, str]]:
        """(share of the axis, label) of each tick."""
        return [(self.share(v), label) for v, label in zip(self.ticks, self.labels, strict=True)]


@dataclass(frozen=True)
class Chart:
    """A figure with curves over bands, or with bars.

    Attributes:
        series: the curves; each has a point.
        bars: counts[i] of the values in (i * bar_width, (i + 1) * bar_width].
        height: pixels of the plot and its legend.
        group: charts of a group show their crosshairs together.
        pointer_label: names a position on the x axis; {} is its value.
    """

    title: str
    unit: str
    x: Axis
    y: Axis
    series: Sequence[Series] = ()
    bands: Sequence[Band] = ()
    bars: Sequence[int] = ()
    bar_width: int = 0
    height: int = 150
    group: str = "steps"
    pointer_label: str = "step {}"

    @property
    def values(self) -> list[float]:
        """The values of all curves."""
        return [value for s in self.series for _, value in s.points]

    @property
    def plot_height(self) -> int:
        """Pixels of the plot; less with a legend, so that cards side by side are equally tall."""
        return self.height - LEGEND_HEIGHT * (len(self.series) > 1)

    def y_pixel(self, share: float) -> float:
        """Return the pixels from the top of a position on the y axis: 0 is its low end, 1 its high end."""
        return round(TOP + (1 - share) * (self.plot_height - TOP), 1)

    @property
    def summary(self) -> str:
        """The chart in words: the first and last value of each curve, or "histogram"."""
        ends = (f"{s.name} {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in self.series)
        return ", ".join(ends) or "histogram"

    @property
    def data(self) -> dict:
        """The JSON that page.js reads. A point: [x, value, pixels from the top]."""

        def row(x: float, value: float) -> list[float]:
            # One pixel above the grid: a curve at the very bottom keeps its whole stroke.
            return [x, float(f"{value:.5g}"), round(self.y_pixel(self.y.share(value)) - 1, 1)]

        return {
            "from": self.x.low,
            "to": self.x.high,
            "group": self.group,
            "label": self.pointer_label,
            "series": [
                {"name": s.name, "style": s.style, "points": [row(*point) for point in downsample(s.points)]}
                for s in self.series
            ],
        }


def downsample(points: Points, buckets: int = 250) -> Points:
    """Return at most 2 * buckets + 2 points: the first, the last, and each bucket's lowest and highest.

    The buckets are equal intervals of x. Outliers in both directions stay, and few points stay as they are.
    """
    if len(points) <= 2 * buckets:
        return points
    first, last = points[0][0], points[-1][0]
    intervals: list[Points] = [[] for _ in range(buckets)]
    for point in points:
        intervals[min(int((point[0] - first) / (last - first) * buckets), buckets - 1)].append(point)
    chosen = {points[0], points[-1]}
    for interval in filter(None, intervals):
        chosen |= {min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])}
    return sorted(chosen)


def running_mean(points: Points, window: int) -> Points:
    """Return the mean of the last `window` points (fewer at the beginning) at each point."""
    sums = [*accumulate((value for _, value in points), initial=0.0)]
    return [(x, (sums[i] - sums[max(0, i - window)]) / min(i, window)) for i, (x, _) in enumerate(points, 1)]


def nice_step(span: float, max_intervals: int) -> float:
    """Return the smallest of {1, 2, 2.5, 5} * 10**n of which max_intervals are at least `span`."""
    power = 10.0 ** math.floor(math.log10(span / max_intervals))
    return next(m * power for m in (1, 2, 2.5, 5, 10, 20) if span <= max_intervals * m * power * (1 + 1e-9))


def needs_log(values: list[float]) -> bool:
    """Return whether a linear scale would not do: all are positive, the highest far above the median."""
    return min(values) > 0 and max(values) > 50 * sorted(values)[len(values) // 2]


def value_axis(values: list[float], max_intervals: int = 4, with_zero: bool = True) -> Axis:
    """Return a `log_axis` around the values if `needs_log`, else a `linear_axis`."""
    return (
        log_axis(values, max_intervals)
        if needs_log(values)
        else linear_axis(values, max_intervals, with_zero)
    )


def log_axis(values: list[float], max_intervals: int = 4) -> Axis:
    """Return a logarithmic axis around positive values; its ends are 1, 2 or 5 times a power of ten."""
    bottom, top = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    levels = [m * 10.0**e for e in range(bottom - 1, top + 1) for m in (1, 2, 5)]
    low = max(v for v in levels if v <= min(values))
    high = min((v for v in levels if v > low and v >= max(values)), default=2 * 10.0**top)
    ticks = [v for v in levels if low <= v <= high]
    if len(ticks) > 2 * max_intervals:  # whole powers of ten
        ticks = [10.0**e for e in range(bottom, top + 1, max(1, math.ceil((top - bottom) / max_intervals)))]
        low, high = 10.0**bottom, 10.0**top
    return Axis(low, high, ticks, [tick_label(v, v) for v in ticks], is_log=True)


def linear_axis(values: list[float], max_intervals: int = 4, with_zero: bool = True) -> Axis:
    """Return a linear axis with round numbers around the values, and around 0 if with_zero."""
    low, high = min(values), max(values)
    if with_zero or low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        high = 1.0
    step = nice_step(high - low, max_intervals)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(first * step, last * step, ticks, [tick_label(v, step) for v in ticks])


def step_axis(first: int, last: int, max_intervals: int = 4) -> Axis:
    """Return an axis between two steps, with ticks at both and at round steps that do not overlap them."""
    if first == last:
        return Axis(first - 1, last + 1, [first], [f"{first:,}"])
    step = max(1, int(nice_step(last - first, max_intervals)))
    ticks = [first, *(s for s in range(0, last, step) if min(s - first, last - s) > step / 2), last]
    return Axis(first, last, [*ticks], [f"{s:,}" for s in ticks])


def time_axis(seconds: float, max_intervals: int = 4) -> Axis:
    """Return an axis from 0 to `seconds`, with ticks at round numbers of seconds."""
    step = nice_step(seconds, max_intervals)
    ticks = [i * step for i in range(int(seconds / step + 1e-9) + 1)]
    return Axis(0.0, seconds, ticks, [f"{tick_label(v, step)} s" for v in ticks])


def number(value: float) -> str:
    """Format a value with about four digits: 12.96, 5,677, 3.00e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def short_duration(seconds: float) -> str:
    """Format a duration: 1.2 s, 350 ms."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def tick_label(value: float, step: float) -> str:
    """Return a tick's label with the decimals that distinguish ticks `step` apart."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or step < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    decimals = next((d for d in range(4) if abs(step - round(step, d)) < step * 1e-6), 4)
    return f"{value:,.{decimals}f}"


def step_chart(
    title: str, unit: str, series: list[Series], steps: tuple[int, int], height: int = 150
) -> list[Chart]:
    """Return [a chart of the curves over the steps steps[0] to steps[1]], or [] if no curve has a point.

    Args:
        title: heading of the chart.
        unit: unit of the values, or a remark on them, to show beside the title; may be "".
        series: the curves; those without a point are left out.
        steps: the ends of the x axis, in optimizer steps.
        height: pixels of the plot and its legend.
    """
    series = [s for s in series if s.points]
    if not series:
        return []
    y = value_axis([value for s in series for _, value in s.points])
    return [Chart(title, unit, step_axis(*steps), y, series, height=height)]


def loss_charts(chart: Chart) -> list[Chart]:
    """Return [the chart with a linear y axis], and, if all values are positive, also with a log axis."""
    axes = [linear_axis(chart.values, with_zero=False)]
    axes += [log_axis(chart.values)] if min(chart.values) > 0 else []
    return [replace(chart, y=y) for y in axes]


def histogram(title: str, unit: str, bar_width: int, counts: list[int], height: int = 150) -> Chart:
    """Return a chart of bars: counts[i] of the values in (i * bar_width, (i + 1) * bar_width].

    Args:
        title: heading of the chart.
        unit: what is counted, by which value, to show beside the title: "rows by tokens".
        bar_width: width of a bar, in the unit of the values.
        counts: number of values in each bar; the first bar begins at 0.
        height: pixels of the plot.
    """
    axes = step_axis(0, bar_width * len(counts)), value_axis([0, *counts])
    return Chart(title, unit, *axes, bars=counts, bar_width=bar_width, height=height)
