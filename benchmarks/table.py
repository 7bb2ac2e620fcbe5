"""The results as a table and as a picture."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.systems import OURS, SYSTEMS, Setting

SETTLING = 3  # first steps that do not count: compilation, the allocator, clocks


@dataclass(frozen=True)
class Row:
    """One run. step_seconds: median of the steps after the first SETTLING; peak_gib: on the rank with most;
    adapters: the trained weights' dtype. problem: why there is no result, in which case these are None."""

    setting: Setting
    system: str
    label: str
    step_seconds: float | None = None
    tokens_per_second_per_gpu: float | None = None
    peak_gib: float | None = None
    adapters: str | None = None
    problem: str = ""


def measured(setting: Setting, system: str, label: str, result: dict, tokens: int, steps: int) -> Row:
    """The row of what a script printed (peers/work.py). tokens: that a step of all ranks must have had. Raises
    ValueError if it had others: speeds would not compare."""
    if result["tokens"] != tokens:
        raise ValueError(f"took {result['tokens']:g} tokens per step, not {tokens}")
    seconds = statistics.median(result["step_seconds"][SETTLING - steps :])
    speed = tokens / seconds / setting.gpus
    return Row(setting, system, label, seconds, speed, result["peak_gib"], result["adapters"])


def ratio(row: Row, rows: list[Row], name: str) -> float | None:
    """Of a figure of the row to the same figure of ours: the first row of ours with the same setting. None if either
    is missing."""
    ours = next((r for r in rows if r.setting == row.setting and r.system == OURS), None)
    if ours is None or row.problem or ours.problem:
        return None
    return getattr(row, name) / getattr(ours, name)


def markdown(rows: list[Row]) -> str:
    lines = [
        "| setting | system | tokens/s per GPU | x ours | step | peak allocated | x ours | adapters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    before = None
    for row in rows:
        cells = [str(row.setting) if row.setting != before else "", row.label]
        if row.problem:
            cells += [row.problem.replace("|", "\\|"), "", "", "", "", ""]
        else:
            cells += [
                f"{row.tokens_per_second_per_gpu:,.0f}",
                _shown(ratio(row, rows, "tokens_per_second_per_gpu")),
                f"{row.step_seconds:.3f} s",
                f"{row.peak_gib:.2f} GiB",
                _shown(ratio(row, rows, "peak_gib")),
                row.adapters,
            ]
        lines.append(f"| {' | '.join(cells)} |")
        before = row.setting
    return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Speed against memory, as a PNG: a colour for each system, a marker for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    colours = dict(zip(SYSTEMS, plt.get_cmap("tab10").colors, strict=False))
    markers = dict(zip(dict.fromkeys(row.setting for row in rows), "osD^vP*Xd<>ph8" * 9, strict=False))
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    good = [row for row in rows if not row.problem]
    for row in good:
        at = (row.peak_gib, row.tokens_per_second_per_gpu)
        axes.plot(*at, markers[row.setting], color=colours[row.system], markersize=8)
        axes.annotate(row.label, at, (6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="peak memory, GiB", ylabel="tokens/s per GPU", title=title)
    axes.set_xlim(0, 1.3 * max(row.peak_gib for row in good))  # room for the labels
    axes.set_ylim(0, 1.1 * max(row.tokens_per_second_per_gpu for row in good))
    axes.grid(alpha=0.25)
    kinds = {row.setting: markers[row.setting] for row in good}
    axes.legend(
        [Line2D([], [], color="grey", marker=m, linestyle="") for m in kinds.values()],
        [str(setting) for setting in kinds],
        fontsize=8,
    )
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
