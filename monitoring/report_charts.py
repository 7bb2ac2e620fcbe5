"""The curves and bars of report.html and memory.html: plain SVG, made here.

A chart must keep its text readable on a telephone and on a wide screen. So nothing is scaled but the curve: its
SVG is stretched (preserveAspectRatio="none", strokes keep their width), while ticks and labels stand beside it
at positions in per cent and in pixels. Colours and fonts are classes, which page.css fills in.

Coordinates inside a curve: x 0 to 1000 from the first to the last step (or from 0 to the last second), y in
pixels from the top.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDE, LABELS = 1000, 62  # width of a curve in its own units; width of the labels of the y axis in pixels
LEGEND = 20  # pixels of a legend's line
TOP, BOTTOM = 8, 24  # pixels above the highest value; pixels below the lowest, for the labels of the x axis


@dataclass(frozen=True)
class Series:
    """One curve. points: (step or seconds, value) in their order, null values left out; style: its class, one of
    "main", "faint", "second"; dots: a mark on each point, where there are few."""

    name: str
    points: list[tuple[float, float]]
    style: str = "main"
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis, in its units. style: its class; note: what a browser shows when pointed at it."""

    name: str
    start: float
    end: float
    style: str
    note: str


@dataclass(frozen=True)
class Axis:
    """low, high: the values at bottom and top; ticks: the values that have a line; log: a logarithmic scale."""

    low: float
    high: float
    ticks: list[float] = field(default_factory=list)
    log: bool = False

    def share(self, value: float) -> float:
        """Where the value lies: 0 at the bottom, 1 at the top."""
        at, low, high = (math.log10(v) if self.log else v for v in (value, self.low, self.high))
        return (at - low) / (high - low)


def downsample(points: list, buckets: int = 250) -> list:
    """At most 2 * buckets + 2 points: the lowest and the highest of each of equal spans of steps, in order, and the
    first and the last point. What stands out, up or down, stays."""
    if len(points) <= 2 * buckets:
        return points
    first, last = points[0][0], points[-1][0]
    spans: list[list] = [[] for _ in range(buckets)]
    for point in points:
        spans[min(int((point[0] - first) / (last - first) * buckets), buckets - 1)].append(point)
    kept = {points[0], points[-1]}
    for span in filter(None, spans):
        kept |= {min(span, key=lambda p: p[1]), max(span, key=lambda p: p[1])}
    return sorted(kept)


def running_mean(points: list, window: int) -> list:
    """The mean of the last `window` points, at each point; of those there are, at the beginning."""
    sums, total = [0.0], 0.0
    for _, value in points:
        total += value
        sums.append(total)
    return [(x, (sums[i] - sums[max(0, i - window)]) / min(i, window)) for i, (x, _) in enumerate(points, 1)]


def nice_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that divides span into at most `most` parts."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(m * power for m in (1, 2, 2.5, 5, 10, 20) if span <= most * m * power * (1 + 1e-9))


def value_axis(values: list[float], most: int = 4, zero: bool = True) -> Axis:
    """Round numbers around the values, and 0 with `zero`; logarithmic where a few lie so far above the others that
    nothing else would show."""
    low, high = min(values), max(values)
    middle = sorted(values)[len(values) // 2]
    if low > 0 and high > 50 * middle:
        bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, math.ceil((top - bottom) / most))
        return Axis(10.0**bottom, 10.0**top, [10.0**e for e in range(bottom, top + 1, every)], log=True)
    if zero or low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        high = 1.0
    step = nice_step(high - low, most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, [i * step for i in range(first, last + 1)])


def step_axis(first: int, last: int, most: int = 4) -> Axis:
    """From the first to the last step; ticks at round steps, and none beside another one."""
    if first == last:
        return Axis(first - 1, last + 1, [first])
    step = max(1, int(nice_step(last - first, most)))
    inner = [s for s in range(0, last, step) if min(s - first, last - s) > step / 2]
    return Axis(first, last, [first, *inner, last])


def time_axis(seconds: float, most: int = 4) -> Axis:
    """From 0 to exactly so many seconds; ticks at round numbers of them."""
    step = nice_step(seconds, most)
    return Axis(0.0, seconds, [i * step for i in range(int(seconds / step + 1e-9) + 1)])


def number(value: float) -> str:
    """A value with about four digits: 12.96, 5,677, 3.00e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def tick(value: float, axis: Axis) -> str:
    """A tick's label: as many decimals as tell the ticks apart."""
    if value == 0:
        return "0"
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 and not axis.log else abs(value)
    if abs(value) >= 1e6 or step < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    decimals = next((d for d in range(4) if abs(step - round(step, d)) < step * 1e-6), 4)
    return f"{value:,.{decimals}f}"


def _frame(
    x: Axis, y: Axis, height: int, curve: str, label: str, x_labels: list[str], bands: Sequence[Band] = ()
) -> str:
    """Axes, grid, bands and labels around the inner SVG `curve`. label: the picture in words."""

    def level(value: float) -> str:
        return f"{TOP + (1 - y.share(value)) * (height - TOP):.1f}"

    names = "".join(
        f'<text x="{LABELS - 8}" y="{level(v)}" dy="4" text-anchor="end">{tick(v, y)}</text>' for v in y.ticks
    )
    grid = "".join(
        f'<line class="{"base" if v == y.low else "grid"}" x1="0" x2="100%" y1="{level(v)}" y2="{level(v)}"/>'
        for v in y.ticks
    )
    below = ""
    for value, text in zip(x.ticks, x_labels, strict=True):
        at = x.share(value)
        anchor = "start" if at < 0.03 else "end" if at > 0.97 else "middle"
        below += f'<text x="{100 * at:.2f}%" y="{height + 18}" text-anchor="{anchor}">{text}</text>'

    def stretched(inner: str) -> str:
        size = f'viewBox="0 0 {WIDE} {height}" preserveAspectRatio="none" width="100%" height="{height}"'
        return f"<svg {size}>{inner}</svg>" if inner else ""

    under = stretched("".join(_band(b, x, height) for b in bands))  # so that the grid is seen
    return (
        f'<div class="plot"><svg class="labels" width="{LABELS}" height="{height + BOTTOM}" aria-hidden="true">'
        f'{names}</svg><svg class="area" width="100%" height="{height + BOTTOM}" role="img"'
        f' aria-label="{escape(label)}">{under}{grid}{stretched(curve)}{_band_names(bands, x)}{below}</svg></div>'
    )


def curves(
    title: str, unit: str, series: list[Series], steps: tuple[int, int], height: int = 150, zero: bool = True
) -> str:
    """A figure with curves over the optimizer steps, from steps[0] to steps[1]; empty text without a point.
    zero: the y axis has 0."""
    series = [s for s in series if s.points]
    if not series:
        return ""
    x, y = step_axis(*steps), value_axis([value for s in series for _, value in s.points], zero=zero)
    return plot(title, unit, series, (x, y), [f"{int(v):,}" for v in x.ticks], ("steps", "step {}"), height)


def plot(
    title: str,
    unit: str,
    series: list[Series],
    axes: tuple[Axis, Axis],
    x_labels: list[str],
    pointed: tuple[str, str],
    height: int,
    bands: Sequence[Band] = (),
) -> str:
    """A figure with curves, each of which has a point, over `bands`. axes: x, y; x_labels: of x's ticks; pointed:
    the group of figures whose crosshairs move together, and how a place on their x axis is told."""
    x, y = axes
    height -= LEGEND if len(series) > 1 else 0  # so that cards side by side are equally tall

    def place(point: tuple[float, float]) -> str:
        # A curve at the very top or bottom keeps its whole width: TOP pixels are left, and 1 below.
        return f"{x.share(point[0]) * WIDE:.1f},{TOP + (1 - y.share(point[1])) * (height - TOP) - 1:.1f}"

    drawn, data = "", []
    for s in series:
        points = downsample(s.points)
        path = "M" + "L".join(map(place, points)) + ("h0" if len(points) == 1 else "")
        drawn += f'<path class="line {s.style}" d="{path}"/>'
        if s.dots and len(points) <= 40:
            drawn += f'<path class="dots {s.style}" d="{"".join(f"M{place(p)}h0" for p in points)}"/>'
        heights = [round(TOP + (1 - y.share(v)) * (height - TOP) - 1, 1) for _, v in points]
        rows = [[at, float(f"{v:.5g}"), h] for (at, v), h in zip(points, heights, strict=True)]
        data.append({"name": s.name, "style": s.style, "points": rows})
    ends = ", ".join(f"{s.name} {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in series)
    chart = _frame(x, y, height, drawn, f"{title}: {ends}", x_labels, bands)
    legend = "".join(f'<span><i class="key {s.style}"></i>{escape(s.name)}</span>' for s in series)
    group, label = pointed
    values = {"from": x.low, "to": x.high, "group": group, "label": label, "series": data}
    scale = ", log scale" if y.log else ""
    legend = f'<span class="legend">{legend}</span>' if len(series) > 1 else ""
    return (
        f'<figure class="card chart" data-height="{height}"><figcaption><h3>{escape(title)}</h3>'
        f'<span class="unit">{escape(unit)}{scale}</span><output>last {number(series[0].points[-1][1])}</output>{legend}</figcaption>'
        f'{chart}<script type="application/json">{embedded(json.dumps(values, separators=(",", ":")))}</script></figure>'
    )


def _band(band: Band, x: Axis, height: int) -> str:
    left, right = (WIDE * x.share(v) for v in (band.start, band.end))
    return (
        f'<rect class="band {band.style}" x="{left:.1f}" width="{right - left:.1f}" y="0" height="{height}">'
        f"<title>{escape(band.note)}</title></rect>"
    )


def _band_names(bands: Sequence[Band], x: Axis) -> str:
    """Above the curve, in bands that are wide enough for them."""
    shares = [(b, x.share(b.start), x.share(b.end)) for b in bands]
    return "".join(
        f'<text class="phase" x="{50 * (left + right):.2f}%" y="{TOP + 4}" text-anchor="middle">{escape(b.name)}</text>'
        for b, left, right in shares
        if right - left > 0.16
    )


def bars(title: str, unit: str, width: int, counts: list[int], height: int = 150) -> str:
    """A figure with a histogram: counts[i] of the values in (i * width, (i + 1) * width]."""
    x = step_axis(0, width * len(counts))
    y = value_axis([0, *counts])
    drawn = ""
    for i, count in enumerate(counts):
        tall = y.share(count) * (height - TOP)
        left, right = (WIDE * j / len(counts) for j in (i, i + 1))
        drawn += (
            f'<rect class="bar" x="{left:.1f}" width="{right - left:.1f}" y="{height - tall:.1f}"'
            f' height="{tall:.1f}"><title>{i * width + 1:,} to {(i + 1) * width:,} tokens: {count:,} rows</title></rect>'
        )
    chart = _frame(x, y, height, drawn, f"{title}: histogram", [f"{int(v):,}" for v in x.ticks])
    return (
        f'<figure class="card chart"><figcaption><h3>{escape(title)}</h3><span class="unit">{escape(unit)}</span>'
        f"</figcaption>{chart}</figure>"
    )


def embedded(text: str) -> str:
    """JSON that cannot end the <script> it stands in."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
