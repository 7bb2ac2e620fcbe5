"""The results as a table and as a chart."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.systems import OURS, SYSTEMS, Setting
from monitoring.host_time import BUSY, PARTS, WAITING

WARMUP_STEPS = 3  # first steps that are not measured: compilation, the allocator, clocks


@dataclass(frozen=True)
class Row:
    """Result of one run; the figures are None if there is a problem.

    Attributes:
        setting: the work.
        system: name of the system.
        label: name in the table.
        step_seconds: median of the steps after WARMUP_STEPS.
        tokens_per_second_per_gpu: speed.
        peak_gib: memory of the rank with the most.
        adapters: dtype of the trained weights.
        host_seconds: the step on rows so short that it takes about as long as the host.
        host_parts: {part: seconds of the host in such a step under the profiler}; None = not measured.
        problem: why there is no result, or "".
    """

    setting: Setting
    system: str
    label: str
    step_seconds: float | None = None
    tokens_per_second_per_gpu: float | None = None
    peak_gib: float | None = None
    adapters: str | None = None
    host_seconds: float | None = None
    host_parts: dict[str, float] | None = None
    problem: str = ""


def make_row(
    setting: Setting, system: str, label: str, result: dict, expected_tokens: int, total_steps: int
) -> Row:
    """Make the row of what a script printed. Raises ValueError for other than `expected_tokens` per step.

    Args:
        setting: the work.
        system: name of the system.
        label: name in the table.
        result: what the script printed (peers/work.py).
        expected_tokens: tokens per step of all ranks; with others, speeds would not compare.
        total_steps: number of steps, warm-up included.
    """
    if result["tokens"] != expected_tokens:
        raise ValueError(f"took {result['tokens']:g} tokens per step, not {expected_tokens}")
    seconds = statistics.median(result["step_seconds"][WARMUP_STEPS - total_steps :])
    speed = expected_tokens / seconds / setting.gpus
    return Row(setting, system, label, seconds, speed, result["peak_gib"], result["adapters"])


def ratio_to_ours(row: Row, rows: list[Row], figure: str) -> float | None:
    """Divide a figure of `row` by that of the first row of ours with the same setting.

    Returns None if one of the two has no result. figure: a field of Row.
    """
    ours = next((r for r in rows if r.setting == row.setting and r.system == OURS), None)
    if ours is None or row.problem or ours.problem:
        return None
    return getattr(row, figure) / getattr(ours, figure)


def format_markdown(rows: list[Row]) -> str:
    """Format the rows as a Markdown table."""
    lines = [
        "| setting | system | tokens/s per GPU | x ours | step | host | peak allocated | x ours | adapters |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    previous = None
    for row in rows:
        cells = [str(row.setting) if row.setting != previous else "", row.label]
        if row.problem:
            cells += [row.problem.replace("|", "\\|"), "", "", "", "", "", ""]
        else:
            cells += [
                f"{row.tokens_per_second_per_gpu:,.0f}",
                _format_ratio(ratio_to_ours(row, rows, "tokens_per_second_per_gpu")),
                f"{row.step_seconds:.3f} s",
                "" if row.host_seconds is None else f"{row.host_seconds:.3f} s",
                f"{row.peak_gib:.2f} GiB",
                _format_ratio(ratio_to_ours(row, rows, "peak_gib")),
                row.adapters,
            ]
        lines.append(f"| {' | '.join(cells)} |")
        previous = row.setting
    return "\n".join(lines) + "\n"


def format_host_parts(rows: list[Row]) -> str:
    """Format what the host does in a step as a Markdown table; "" if no row has it."""
    measured = [(row, row.host_parts) for row in rows if row.host_parts]
    if not measured:
        return ""
    columns = (*PARTS, BUSY, WAITING)
    lines = [f"| setting | system | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for row, parts in measured:
        seconds = [f"{parts[column]:.3f} s" for column in columns]
        lines.append(f"| {row.setting} | {row.label} | {' | '.join(seconds)} |")
    return "\n".join(lines) + "\n"


def _format_ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def draw_chart(rows: list[Row], title: str, path: Path) -> None:
    """Draw speed against memory as a PNG: a colour for each system, a marker for each setting.

    Raises ValueError if every row has a problem.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    colours = dict(zip(SYSTEMS, plt.get_cmap("tab10").colors, strict=False))
    markers = dict(zip(dict.fromkeys(row.setting for row in rows), "osD^vP*Xd<>ph8" * 9, strict=False))
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    measured = [row for row in rows if not row.problem]
    for row in measured:
        point = (row.peak_gib, row.tokens_per_second_per_gpu)
        axes.plot(*point, markers[row.setting], color=colours[row.system], markersize=8)
        axes.annotate(row.label, point, (6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="peak memory, GiB", ylabel="tokens/s per GPU", title=title)
    axes.set_xlim(0, 1.3 * max(row.peak_gib for row in measured))  # room for the labels
    axes.set_ylim(0, 1.1 * max(row.tokens_per_second_per_gpu for row in measured))
    axes.grid(alpha=0.25)
    kinds = {row.setting: markers[row.setting] for row in measured}
    axes.legend(
        [Line2D([], [], color="grey", marker=m, linestyle="") for m in kinds.values()],
        [str(setting) for setting in kinds],
        fontsize=8,
    )
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
