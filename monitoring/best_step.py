"""The best step of a finished run: whether RUN/best holds better weights than the RUN itself.

A RUN that reached its end holds the weights of its last step. If it is continued, and stopped on the way, it
still holds these, and metrics.jsonl has later steps. RUN/best holds those of the best evaluation, if
--eval_every asked for more than the one at the end.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from data.answers import make_printable
from files.names import BEST, METRICS, SCORE
from monitoring.run_facts import FACTS, SAVED_STEP
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, read_json


@dataclass(frozen=True)
class BestStep:
    """The result in RUN/best, which evaluated better than the RUN as far as that is known.

    Attributes:
        folder: RUN/best.
        step, loss: the evaluation of these weights.
        last_step: step of the weights in the RUN; None = not known.
        last_loss: their evaluation; NaN or infinite if it was, None = not known.
    """

    folder: Path
    step: int
    loss: float
    last_step: int | None
    last_loss: float | None

    def describe(self) -> str:
        """Return the line of a command that opens the RUN."""
        run = self.folder.parent
        other = f"{run} has the last step, {self.last_step}, with {format_loss(self.last_loss)}"
        if self.last_step is None:
            other = f"which step {run} has is not known: the run was continued, and has not reached its end"
        return make_printable(
            f"{self.folder} has the best evaluation: loss {self.loss:.4f} at step {self.step}; {other}"
        )


def find_better_step(run: Path) -> BestStep | None:
    """Return the result in RUN/best; None if there is none, or it evaluated no better than the RUN's."""
    evaluations = read_evaluations(run)
    try:
        score = read_json(run / BEST / SCORE, MAX_CONFIG_BYTES)
    except UserError:
        return None
    step, loss = score.get("step"), score.get("eval_loss")
    if type(step) is not int or not isinstance(loss, int | float) or not evaluations:
        return None
    last_step = read_saved_step(run)
    last_loss = None if last_step is None else dict(evaluations).get(last_step)
    if step == last_step or (last_loss is not None and last_loss <= loss):  # never true of a NaN
        return None
    return BestStep(run / BEST, step, loss, last_step, last_loss)


def format_loss(loss: float | None) -> str:
    """Return a loss as a message shows it."""
    if loss is None:
        return "a loss that is not known"
    return f"{loss:.4f}" if math.isfinite(loss) else "a loss that is not finite"


def read_saved_step(run: Path) -> int | None:
    """Return the step whose weights the RUN holds; None = not known, or it holds none.

    Runs of earlier versions do not record it: that of metrics.jsonl's last line.
    """
    with contextlib.suppress(UserError):
        facts = read_json(run / FACTS, MAX_CONFIG_BYTES)
        if SAVED_STEP in facts:
            step = facts[SAVED_STEP]
            return step if type(step) is int else None
    steps = [step for step, _ in _read_metrics(run, "step")]
    return steps[-1] if steps else None


def read_evaluations(run: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of each evaluation in metrics.jsonl; [] if it is missing or damaged."""
    return _read_metrics(run, "eval_loss")


def _read_metrics(run: Path, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of each line of metrics.jsonl with this field; null is NaN."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        *lines, _ = (run / METRICS).read_text(encoding="utf-8").split("\n")  # the last one may be incomplete
        steps = [json.loads(line) for line in lines if f'"{name}"' in line]
        return [(int(s["step"]), math.nan if (v := s[name]) is None else float(v)) for s in steps]
    return []
