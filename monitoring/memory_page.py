"""memory.html and memory.png: the memory of every rank over time, out of the recordings of monitoring/memory_history.py."""

from __future__ import annotations

from html import escape
from pathlib import Path

from files.atomic_writes import stage_files, write_text
from monitoring.memory_history import Part, Recording
from monitoring.report_charts import Band, Series, number, plot, tick, time_axis, value_axis
from monitoring.report_page import document

STYLES = ("main", "second")  # of a part's curves, in their order
LINES = ("#2563c4", "#c4560a")  # the same in memory.png
COLOURS = {"wrap": "#dcdce6", "load": "#ececf1", "forward": "#dcebfb", "backward": "#fde9d4", "optimizer": "#dcf2e0"}  # fmt: skip
HEIGHT = 190  # pixels of a chart
UNITS = {
    "allocated": "GiB of tensors, and what torch holds of the GPU",
    "resident": "GiB of the process (resident size)",
}


def fullest(recordings: list[Recording]) -> tuple[Recording, Part]:
    """The rank and the part with the highest peak."""
    pairs = [(r, part) for r in recordings for part in r.parts]
    return max(pairs, key=lambda pair: pair[1].peak.peak)


def highest(recordings: list[Recording]) -> float:
    """GiB: of all curves."""
    return max(v for r in recordings for part in r.parts for line in part.curves.values() for _, v in line)


def page(recordings: list[Recording], title: str) -> str:
    """The whole of memory.html. recordings: by rank, together of at least one part."""
    top = highest(recordings)
    parts = [_header(recordings, title), _tiles(recordings), _key()]
    return document(f"Memory · {title}", parts + [_rank(r, top) for r in recordings])


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _header(recordings: list[Recording], title: str) -> str:
    device = recordings[0].device
    ranks = f"{len(recordings)} × {device}" if len(recordings) > 1 else device
    return f'<header><h1>Memory over time</h1><p class="about"><b>{escape(title)}</b> · {escape(ranks)}</p></header>'


def _tiles(recordings: list[Recording]) -> str:
    rank, part = fullest(recordings)
    tiles = [("Peak", part.peak.peak, f"in the {part.peak.name} of {part.name}, rank {rank.rank}")]
    # Of the fullest rank: what was left at the end of each phase, the last time.
    ends: dict[str, tuple[float, str]] = {}
    for each in rank.parts:
        ends |= {span.name: (span.last, each.name) for span in each.spans}
    tiles += [(f"After {name}", last, f"{where}, rank {rank.rank}") for name, (last, where) in ends.items()]
    inner = "".join(
        f'<div class="card tile"><dt>{escape(n)}</dt><dd>{number(v)} GiB<small>{escape(s)}</small></dd></div>'
        for n, v, s in tiles
    )
    return f'<dl class="tiles">{inner}</dl>'


def _key() -> str:
    names = "".join(
        f'<span><svg class="swatch" width="14" height="14"><rect class="band {n}" width="14" height="14"/></svg>{n}</span>'
        for n in COLOURS
    )
    return (
        f'<section><p class="legend">{names}</p><p class="note">A chart for each step, all to the same scale. Point at'
        " a curve for its values, at a ground for its phase."
        "</p></section>"
    )


def _rank(recording: Recording, top: float) -> str:
    charts = "".join(_chart(part, top) for part in recording.parts)
    rows = "".join(
        f"<tr><td>{escape(part.name)}</td><td>{escape(span.name)}</td><td>{duration(span.end - span.start)}</td>"
        f"<td>{number(span.peak)}</td><td>{number(span.last)}</td></tr>"
        for part in recording.parts
        for span in part.spans
    )
    head = "<thead><tr><th></th><th>Phase</th><th>Time</th><th>Peak, GiB</th><th>At its end, GiB</th></tr></thead>"
    table = f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
    return (
        f'<section><h2>Rank {recording.rank}</h2><div class="grid">{charts}</div>'
        f'<details class="card"><summary>Phases of rank {recording.rank}</summary>{table}</details></section>'
    )


def _chart(part: Part, top: float) -> str:
    series = [
        Series(name, line, style) for (name, line), style in zip(part.curves.items(), STYLES, strict=False)
    ]
    x, y = time_axis(part.seconds), value_axis([0.0, 1.1 * top])  # room for the names of the phases
    bands = [
        Band(
            s.name,
            s.start,
            s.end,
            s.name,
            f"{s.name}: {duration(s.end - s.start)}, peak {number(s.peak)} GiB, {number(s.last)} GiB at its end",
        )
        for s in part.spans
    ]
    labels = [f"{tick(v, x)} s" for v in x.ticks]
    pointed = (part.name, "{} s")
    return plot(part.name.capitalize(), UNITS[series[0].name], series, (x, y), labels, pointed, HEIGHT, bands)


def write_pages(path: Path, recordings: list[Recording], title: str) -> None:
    """<path>.html and <path>.png. Raises OSError."""
    write_text(path.with_name(f"{path.name}.html"), page(recordings, title))
    draw(recordings, title, path.with_name(f"{path.name}.png"))


def draw(recordings: list[Recording], title: str, path: Path) -> None:
    """The same as a PNG: a row for each rank, a column for the start and for each step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(len(r.parts) for r in recordings)
    size = (3.4 * columns + 0.6, 2.2 * len(recordings) + 0.6)
    figure, axes = plt.subplots(len(recordings), columns, figsize=size, sharey=True, squeeze=False,
                                layout="constrained")  # fmt: skip
    for row, recording in zip(axes, recordings, strict=True):
        for axis in row[len(recording.parts) :]:
            axis.set_axis_off()
        for axis, part in zip(row, recording.parts, strict=False):
            _draw_part(axis, part)
        row[0].set(ylabel=f"rank {recording.rank}, GiB", ylim=(0, 1.08 * highest(recordings)))
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in COLOURS.values()]
    figure.legend(
        handles, COLOURS, loc="outside upper right", ncols=len(COLOURS), frameon=False, fontsize="small"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    with stage_files(path.parent) as stage:
        figure.savefig(stage(path.name), dpi=110, format="png")
    plt.close(figure)


def _draw_part(axis, part: Part) -> None:
    for span in part.spans:
        axis.axvspan(span.start, span.end, color=COLOURS[span.name], linewidth=0)
    for (_, line), colour in zip(part.curves.items(), LINES, strict=False):
        axis.plot(*zip(*line, strict=True), color=colour, linewidth=1.2)
    axis.set_title(f"{part.name}, peak {number(part.peak.peak)} GiB", fontsize="small")
    axis.set(xlabel="seconds", xlim=(0, part.seconds))
    axis.grid(alpha=0.25)
