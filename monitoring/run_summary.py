"""The numbers that sum up a run: best evaluation, last losses, time, speed, memory; from metrics.jsonl."""

from __future__ import annotations

import math
from dataclasses import dataclass

from monitoring.report_charts import Points


@dataclass(frozen=True)
class RunSummary:
    """A run in numbers; None where metrics.jsonl has no finite value.

    Attributes:
        best: (step, loss) of the best evaluation.
        last_evaluation: loss of the last evaluation; NaN if it gave no number, None if there was none.
        first_loss, last_loss: training loss of the first step that has a finite one, and of the last step.
        steps: optimizer steps.
        skipped: steps that were skipped as NaN or infinite.
        seconds: time of all steps, without evaluations.
        tokens: of all steps and ranks.
        speed: median of the steps after the first, which warms up, in tokens/s of all ranks.
        peak_gib: on the fullest rank.
    """

    best: tuple[float, float] | None
    last_evaluation: float | None
    first_loss: float | None
    last_loss: float | None
    steps: int
    skipped: int
    seconds: float
    tokens: float
    speed: float | None
    peak_gib: float | None


def summarize(steps: list[dict]) -> RunSummary:
    """Return the summary of the lines of a metrics.jsonl, at least one."""
    losses, evaluations = finite_points(steps, "loss"), finite_points(steps, "eval_loss")
    rates = finite_points(steps[1:], "tokens_per_second") or finite_points(steps, "tokens_per_second")
    memory = finite_points(steps, "memory_allocated_gib")
    return RunSummary(
        best=min(evaluations, key=lambda point: point[1]) if evaluations else None,
        last_evaluation=next(map(_read_loss, reversed([s for s in steps if "eval_loss" in s])), None),
        first_loss=losses[0][1] if losses else None,
        last_loss=losses[-1][1] if losses and losses[-1][0] == steps[-1]["step"] else None,
        steps=len(steps),
        skipped=int(max((v for _, v in finite_points(steps, "bad_steps")), default=0)),  # a running total
        seconds=sum(v for _, v in finite_points(steps, "step_seconds")),
        tokens=sum(v for _, v in finite_points(steps, "tokens")),
        speed=sorted(v for _, v in rates)[len(rates) // 2] if rates else None,
        peak_gib=max(v for _, v in memory) if memory else None,
    )


def describe_loss(loss: float | None) -> str:
    """Return an evaluation's loss as pages show it."""
    if loss is None:
        return "none"
    return f"{loss:.4f}" if math.isfinite(loss) else "not finite"


def _read_loss(step: dict) -> float:
    """Return the evaluation's loss in a line of metrics.jsonl; NaN if it is not finite."""
    return step["eval_loss"] if is_finite(step["eval_loss"]) else math.nan


def finite_points(steps: list[dict], name: str) -> Points:
    """Return (step, value) of each line of metrics.jsonl in which the field `name` is a finite number."""
    return [(s["step"], s[name]) for s in steps if is_finite(s.get(name))]


def is_finite(value: object) -> bool:
    """Return whether a value of a JSON object is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
