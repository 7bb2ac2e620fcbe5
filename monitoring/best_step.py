"""The best step of a finished run: whether RUN/best holds better weights than the RUN itself.

A RUN holds the weights of its last step. RUN/best holds those of the best evaluation, if --eval_every asked
for more than the one at the end.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from files.names import BEST, METRICS, SCORE
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, read_json


@dataclass(frozen=True)
class BestStep:
    """The result in RUN/best, which evaluated better than the RUN.

    Attributes:
        folder: RUN/best.
        step, loss: the evaluation of these weights.
        last_step, last_loss: the last evaluation of the run; the loss may be NaN.
    """

    folder: Path
    step: int
    loss: float
    last_step: int
    last_loss: float

    def describe(self) -> str:
        """Return the line of a command that opens the RUN."""
        return (
            f"{self.folder} has the best evaluation: loss {self.loss:.4f} at step {self.step};"
            f" {self.folder.parent} has the last step, {self.last_step}, with {self.last_loss:.4f}"
        )


def find_better_step(run: Path) -> BestStep | None:
    """Return the result in RUN/best if it evaluated better than the last step; None if not, or not known."""
    evaluations = read_evaluations(run)
    try:
        score = read_json(run / BEST / SCORE, MAX_CONFIG_BYTES)
    except UserError:
        return None
    step, loss = score.get("step"), score.get("eval_loss")
    if type(step) is not int or not isinstance(loss, int | float) or not evaluations:
        return None
    last_step, last_loss = evaluations[-1]
    if step == last_step or last_loss <= loss:  # never true of a NaN
        return None
    return BestStep(run / BEST, step, loss, last_step, last_loss)


def read_evaluations(run: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of each evaluation in metrics.jsonl; [] if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        *lines, _ = (run / METRICS).read_text(encoding="utf-8").split("\n")  # the last one may be incomplete
        steps = [json.loads(line) for line in lines if '"eval_loss"' in line]
        return [(int(s["step"]), math.nan if (v := s["eval_loss"]) is None else float(v)) for s in steps]
    return []
