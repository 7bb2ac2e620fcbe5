"""memory.html and memory.png: each rank's memory over time, recorded by monitoring/memory_history.py."""

from __future__ import annotations

from pathlib import Path

from files.atomic_writes import stage_files, write_text
from monitoring.memory_history import RecordedStep, Recording
from monitoring.page import render
from monitoring.report_charts import Band, Chart, Series, number, short_duration, time_axis, value_axis

LINES = {
    "main": "#2563c4",
    "second": "#c4560a",
}  # style of a curve in memory.html -> its colour in memory.png
COLOURS = {"wrap": "#dcdce6", "load": "#ececf1", "forward": "#dcebfb", "backward": "#fde9d4",
           "optimizer": "#dcf2e0"}  # fmt: skip
HEIGHT = 190  # pixels of a chart
UNITS = {
    "allocated": "GiB of tensors, and what torch holds of the GPU",
    "resident": "GiB of the process (resident size)",
}


def highest_gib(recordings: list[Recording]) -> float:
    """Return the highest value of all curves in GiB."""
    return max(v for r in recordings for step in r.parts for line in step.curves.values() for _, v in line)


def render_memory_page(recordings: list[Recording], title: str) -> str:
    """Return memory.html as text. recordings: in the order of ranks, with at least one step or start."""
    top = highest_gib(recordings)
    return render(
        "memory.html.j2",
        title=f"Memory · {title}",
        run_title=title,
        recordings=recordings,
        headline=_headline(recordings),
        phases=COLOURS,
        charts=[[_chart(step, top) for step in r.parts] for r in recordings],
    )


def _headline(recordings: list[Recording]) -> list[tuple[str, str, str]]:
    """Return tiles (name, value, note): the highest peak; that rank's memory after each phase."""
    fullest, step = max(((r, s) for r in recordings for s in r.parts), key=lambda pair: pair[1].peak.peak)
    rank = f"rank {fullest.rank}"
    tiles = [("Peak", step.peak.peak, f"in the {step.peak.name} of {step.name}, {rank}")]
    ends = {phase.name: (phase.last, s.name) for s in fullest.parts for phase in s.spans}  # its last time
    tiles += [(f"After {name}", last, f"{where}, {rank}") for name, (last, where) in ends.items()]
    return [(name, f"{number(gib)} GiB", note) for name, gib, note in tiles]


def _chart(step: RecordedStep, top: float) -> Chart:
    """Return the chart of a step or of the start; its y axis ends above `top` GiB."""
    series = [
        Series(name, line, style) for (name, line), style in zip(step.curves.items(), LINES, strict=False)
    ]
    bands = [
        Band(s.name, s.start, s.end, f"{s.name}: {short_duration(s.end - s.start)},"
             f" peak {number(s.peak)} GiB, {number(s.last)} GiB at its end")
        for s in step.spans
    ]  # fmt: skip
    axes = time_axis(step.seconds), value_axis([0.0, 1.1 * top])  # room for the names of the phases
    return Chart(step.name.capitalize(), UNITS[series[0].name], *axes, series, bands, height=HEIGHT,
                 group=step.name, pointer_label="{} s")  # fmt: skip


def write_pages(path: Path, recordings: list[Recording], title: str) -> None:
    """Write the recordings as a page <path>.html and a picture <path>.png. Raises OSError."""
    write_text(path.with_name(f"{path.name}.html"), render_memory_page(recordings, title))
    draw_picture(recordings, title, path.with_name(f"{path.name}.png"))


def draw_picture(recordings: list[Recording], title: str, path: Path) -> None:
    """Write the memory curves as a PNG: a row for each rank, a column for the start and for each step."""
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
        for axis, step in zip(row, recording.parts, strict=False):
            _draw_step(axis, step)
        row[0].set(ylabel=f"rank {recording.rank}, GiB", ylim=(0, 1.08 * highest_gib(recordings)))
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in COLOURS.values()]
    figure.legend(
        handles, COLOURS, loc="outside upper right", ncols=len(COLOURS), frameon=False, fontsize="small"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    with stage_files(path.parent) as stage:
        figure.savefig(stage(path.name), dpi=110, format="png")
    plt.close(figure)


def _draw_step(axis, step: RecordedStep) -> None:
    """Draw a step on a matplotlib axis: its phases as coloured grounds, and its curves."""
    for span in step.spans:
        axis.axvspan(span.start, span.end, color=COLOURS[span.name], linewidth=0)
    for (_, line), colour in zip(step.curves.items(), LINES.values(), strict=False):
        axis.plot(*zip(*line, strict=True), color=colour, linewidth=1.2)
    axis.set_title(f"{step.name}, peak {number(step.peak.peak)} GiB", fontsize="small")
    axis.set(xlabel="seconds", xlim=(0, step.seconds))
    axis.grid(alpha=0.25)
