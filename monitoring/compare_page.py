"""compare.html as text: several runs on one page. compare.js draws its charts in the browser."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.program import shell_command
from monitoring.best_step import find_better_step
from monitoring.comparison import (
    Compared,
    describe_data_differences,
    differing_machines,
    differing_options,
    find_best,
    has_different_data,
    shared_prompts,
)
from monitoring.next_commands import next_commands
from monitoring.page import MAX_PROMPTS, duration, render, short_count
from monitoring.report_charts import needs_log
from monitoring.run_curves import PLOTS, WINDOWS, choose_window, make_curves
from monitoring.run_summary import describe_loss, finite_points
from monitoring.sample_images import ImageEmbedder

COLOURS, DASHES = 6, 4  # classes c0 to c5 and d0 to d3 of compare.css


def render_comparison(runs: Sequence[Compared], page: Path) -> str:
    """Return compare.html as text. page: where it is written to, for the command that makes it again."""
    curves = [make_curves(run.files.steps) for run in runs]
    plots = [plot for plot in PLOTS if any(plot.column in each for each in curves)]
    prompts, single = shared_prompts(runs)
    embedder, best = ImageEmbedder(), find_best(runs)
    again = [*shell_command("report.py"), *(str(run.files.folder) for run in runs), "--out", str(page)]
    again += ["--different_data", "true"] if has_different_data(runs) else []
    commands = next_commands(best.files)[:-1] if best else []  # without the one for its own page
    commands.append(("Make this page again", again))
    return render(
        "compare.html.j2",
        style_names=("page.css", "compare.css"),
        script_names=("values.js", "axes.js", "compare.js"),
        title=f"{len(runs)} runs compared",
        remarks=describe_data_differences(runs),
        runs=runs,
        styles=[_style(run) for run in runs],
        rows=[_summary_row(run, run is best) for run in runs],
        best=best,
        plots=plots,
        logs=[_needs_log(runs, plot.column) for plot in plots],
        data={
            "runs": [{"name": r.name, "curves": each} for r, each in zip(runs, curves, strict=True)],
            "plots": [dataclasses.asdict(plot) for plot in plots],
            "windows": WINDOWS,
        },
        window=choose_window(max(run.summary.steps for run in runs)),
        options=differing_options(runs),
        machines=differing_machines(runs),
        prompts=[(prompt, embedder.embed(prompt.folder, prompt.images)) for prompt in prompts[:MAX_PROMPTS]],
        hidden_prompts=len(prompts) - MAX_PROMPTS,
        single_prompts=single,
        commands=[(purpose, shlex.join(command)) for purpose, command in commands],
    )


def _style(run: Compared) -> str:
    """Return the classes of a run's curves: runs of one colour differ in their dashes."""
    return f"c{run.index % COLOURS} d{run.index // COLOURS % DASHES}"


def _needs_log(runs: Sequence[Compared], column: str) -> bool:
    """Return whether a chart is better shown on a log axis at first."""
    values = [value for run in runs for _, value in finite_points(run.files.steps, column)]
    return column.endswith("loss") and needs_log(values)


def _summary_row(run: Compared, is_best: bool) -> list[tuple[str, str]]:
    """Return (value, note) of each column of the table of runs, in the order of the template's headings."""
    found = run.summary
    best = (
        (describe_loss(found.last_evaluation), "")
        if found.best is None
        else (f"{found.best[1]:.4f}", f"step {found.best[0]:,}")
    )
    if is_best:
        best = best[0], f"{best[1]}, the lowest"
    if find_better_step(run.files.folder):
        best = best[0], f"{best[1]}, in best/"
    skipped = f"{found.skipped:,} skipped" if found.skipped else ""
    return [
        best,
        (describe_loss(found.last_evaluation), ""),
        ("not finite" if found.last_loss is None else f"{found.last_loss:.4f}", ""),
        (f"{found.steps:,}", skipped),
        (short_count(found.tokens), ""),
        (duration(found.seconds), ""),
        ("none" if found.speed is None else f"{found.speed:,.0f}", ""),
        ("none" if found.peak_gib is None else f"{found.peak_gib:.2f}", ""),
    ]
