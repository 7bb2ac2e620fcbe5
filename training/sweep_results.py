"""What came of a sweep: its trials from the best on, what mattered, and the lines that it ends with."""

from __future__ import annotations

import shlex
import warnings

import optuna
from optuna.trial import FrozenTrial, TrialState

from files.names import ADAPTER_CONFIG, BEST, CONFIG, OPTIONS
from launch.program import shell_command
from monitoring.report import PAGE as REPORT
from monitoring.sweep_page import SweepPage, TrialRow
from options.config import FIELDS
from options.sweep import Request
from training.sweep_study import Study

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
MIN_COMPLETE = 4  # trials without which importances are noise
TOP_TRIALS = 5  # the best trials, of which PED-ANOVA asks what they have in common
# Options that have no effect if no row is held back.
EVALUATING = ("eval_every", "eval_samples", "early_stopping_patience")
MAX_TEXT = 28  # characters of a value in the table


def collect_results(request: Request, study: Study) -> SweepPage:
    """Return what sweep.html shows: the trials in the order of their losses, and the importances."""
    trials = study.trials()
    rows = [_make_row(request, trial) for trial in trials]
    order = {"complete": 0, "pruned": 1, "running": 2, "paused": 3, "failed": 4}
    rows.sort(key=lambda row: (order[row.state], row.loss if row.loss is not None else 0.0, row.number))
    count = max(request.trials, len(rows))  # an earlier command may have had more --trials
    return SweepPage(request.folder, request.space, rows, count, request.sweep, _measure_importances(study))


def _make_row(request: Request, trial: FrozenTrial) -> TrialRow:
    """Return a trial as a row of the table."""
    seconds = trial.duration.total_seconds() if trial.duration else None
    page = request.run_folder(trial.number) / REPORT
    is_paused = trial.state == TrialState.RUNNING and trial.user_attrs["worker"] is None
    return TrialRow(
        trial.number,
        "paused" if is_paused else STATES[trial.state],
        trial.value if trial.values else None,
        trial.user_attrs["options"],
        tuple(trial.user_attrs.get("losses", ())),
        seconds,
        trial.user_attrs.get("reason", ""),
        str(page.relative_to(request.folder)) if page.exists() else "",
    )


def _measure_importances(study: Study) -> dict[str, float]:
    """Return {option: its share of what makes trials good}, the largest first; {} for too few trials.

    PED-ANOVA compares the values of the best trials with those of all. It needs no scikit-learn. It
    returns equal shares where nothing differs: with equal losses, and for an option with a single value.
    """
    complete = [t for t in study.trials() if t.state == TrialState.COMPLETE]
    names = [each.name for each in study.request.space.dimensions if each.size > 1]
    if len(complete) < MIN_COMPLETE or len({t.value for t in complete}) == 1 or not names:
        return {}
    quantile = min(max(0.1, TOP_TRIALS / len(complete)), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is experimental in Optuna 4
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
        return optuna.importance.get_param_importances(study.study, evaluator=evaluator, params=names)


def format_results(page: SweepPage) -> str:
    """Return the table of trials, the best first, and the importances, as text."""
    names = page.space.names
    header = ["trial", "loss", "state", *names, "time"]
    lines = [header]
    for row in page.rows:
        loss = "" if row.loss is None else f"{row.loss:.4f}"
        seconds = "" if row.seconds is None else f"{row.seconds:.0f} s"
        values = [row.options[name] for name in names]
        texts = [each if len(each) <= MAX_TEXT else f"{each[: MAX_TEXT - 3]}..." for each in values]
        lines.append([str(row.number), loss, row.state, *texts, seconds])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(map(str.rjust, line, widths)).rstrip() for line in lines]
    if page.importances:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in page.importances.items())
        table.append(f"importance: {shares}")
    return "\n".join(table)


def describe_next(request: Request, page: SweepPage) -> list[str]:
    """Return the commands that can follow a sweep with a complete trial."""
    best = page.best
    if best is None:
        return []
    if request.sweep.folds > 1:  # no trial has been trained on all rows
        unset = [f"--{name}={FIELDS[name].default}" for name in EVALUATING
                 if getattr(request.config, name) != FIELDS[name].default]  # fmt: skip
        save = ["--save_model=true"] * (not request.config.save_model)
        again = [*shell_command("train.py"), *request.arguments(best.options), *unset, *save]
        return [f"next, on all rows: {shlex.join(again)}"]
    folder = request.run_folder(best.number)
    # With several evaluations the best weights are in best/; otherwise the result itself is the best.
    saved = folder / BEST if (folder / BEST).is_dir() else folder
    if any((saved / name).exists() for name in (ADAPTER_CONFIG, CONFIG)):
        return [f"try: {shlex.join([*shell_command('generate.py'), str(saved)])}"]
    options = ["--config", str(folder / OPTIONS), "--output_dir", f"{folder}-again", "--save_model", "true"]
    return [f"next: {shlex.join([*shell_command('train.py'), *options])}"]
