"""Steps whose loss or gradient is NaN or infinite: they do not reach the weights, are counted, and end the
run when there are too many.

What decides is the same on every rank, so all of them skip together. Of fp16, whose loss scale begins too
high on purpose, an overflow of the scaled gradient is no fault: the scaler skips such a step itself, and
lowers the scale.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from data.batches import Step
from data.rows import TokenizedRows
from files.disk_room import append_lines
from monitoring.metrics import Metrics, Reading, too_many
from monitoring.tracking import NoTracker
from options.errors import UserError

BAD_STEPS = "bad_steps.jsonl"


class Resumed(NamedTuple):
    """What a run had behind it when it was resumed: optimizer steps, how many of them were bad, and how many
    changed the weights."""

    steps: int = 0
    bad: int = 0
    applied: int = 0


def resumed_from(step: int, state: dict) -> Resumed:
    """step: of a checkpoint; state: of `BadSteps` in it."""
    bad = state["count"]
    return Resumed(step, bad, state.get("applied", step - bad))  # an older checkpoint has only the bad ones


class BadSteps:
    """Judges every step. count: of those that were skipped as bad; applied: of those that changed the
    weights, as steps that fp16's scaler skips by itself do not; stop: more than `most` were bad.

    Args:
        done: steps that a resumed run has behind it.
        most: steps that may be skipped (--max_bad_steps); -1 = any number.
        rows: those of the run, for their numbers in --dataset.
        folder: the RUN.
        scaler: the loop's; what it skips by itself while it scales is no bad step.
        rank: rank 0 writes bad_steps.jsonl.
        tracker: shows a line for each.
    """

    def __init__(
        self,
        *,
        done: int,
        most: int,
        rows: TokenizedRows,
        folder: Path,
        scaler: torch.amp.GradScaler,
        rank: int,
        tracker: NoTracker,
    ):
        self.done, self.most, self.rows, self.scaler, self.tracker = done, most, rows, scaler, tracker
        self.file = folder / BAD_STEPS if rank == 0 else None
        self.count, self.applied, self.stop = 0, 0, False
        # The schedule counts a skipped step too, also the first, which fp16 often skips.
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")

    def step(self, optimizer: torch.optim.Optimizer, reading: Reading) -> None:
        """The optimizer's step, if this one's gradient may be used. A fused optimizer is told so on the GPU,
        and the host goes on; before another's, it waits for the reading."""
        fused = getattr(optimizer, "_step_supports_amp_scaling", False) and not self.scaler.is_enabled()
        # Parameters on the host (--use_cpu_offload): torch would fetch the answer without waiting for it.
        if fused and optimizer.param_groups[0]["params"][0].device.type == reading.finite.device.type:
            # As GradScaler says it to fused optimizers.
            optimizer.found_inf = 1 - reading.finite.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif self._usable(reading.loss(), reading.grad_norm()):
            self.scaler.step(optimizer)

    def decides(self) -> bool:
        """Whether this step's numbers have to be judged before the next step begins: they may end the run, or
        the scaler goes by them."""
        return self.scaler.is_enabled() or too_many(self.count + 1, self.most)

    def judge(self, metrics: Metrics, step: Step) -> Metrics:
        """After the optimizer's step, before the scaler's update. Returns the metrics with the counts."""
        if not self._usable(metrics.loss, metrics.grad_norm):
            self.count += 1
            self.stop = too_many(self.count, self.most)
            self._tell(metrics, step)
        self.applied += math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)
        return dataclasses.replace(metrics, bad_steps=self.count or None, applied_steps=self.applied)

    def state_dict(self) -> dict:
        return {"count": self.count, "applied": self.applied}

    def load_state_dict(self, state: dict) -> None:
        _, self.count, self.applied = resumed_from(self.done, state)
        self.stop = too_many(self.count, self.most)

    def _usable(self, loss: float, grad_norm: float) -> bool:
        return math.isfinite(loss) and (math.isfinite(grad_norm) or self._scaling())

    def _scaling(self) -> bool:
        """Whether the gradient may have overflowed only because it was scaled."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def _tell(self, metrics: Metrics, step: Step) -> None:
        """A line for the user, and one in bad_steps.jsonl with the rows of the step: their numbers in
        --dataset, from 1. JSON has no NaN, so loss and norm are texts."""
        if not self.file:
            return
        numbers = sorted(self.rows.numbers[step.rows].tolist())
        loss, norm = f"{metrics.loss:.6g}", f"{metrics.grad_norm:.6g}"
        line = {
            "step": metrics.step,
            "epoch": metrics.epoch,
            "loss": loss,
            "grad_norm": norm,
            "rows": numbers,
        }
        append_lines(self.file, json.dumps(line) + "\n", self.tracker.say)
        self.tracker.say(
            f"step {metrics.step} skipped: loss {loss}, gradient norm {norm}; its rows: {self.file}"
        )


def no_good_step(history: list[Metrics], resumed: Resumed, scaled: bool, folder: Path) -> str:
    """Return what to tell of a run in which no step changed a weight, else "". The same on all ranks.

    Args:
        history: the steps that were made.
        resumed: what a resumed run had before them.
        scaled: whether the loss is scaled, for fp16.
        folder: the RUN.
    """
    if history[-1].applied_steps if history else resumed.applied:
        return ""
    steps = resumed.steps + len(history)
    last = f"; of the last one, {history[-1].loss:.6g} and {history[-1].grad_norm:.6g}" if history else ""
    fp16 = (
        "fp16 overflows in many models that were trained in bf16: try --precision fp32; where only the"
        " gradient is infinite, its scale is halved at each step, and more steps may do"
    )
    other = (
        "look for a config.json that does not belong to the weights (a norm's eps, RoPE), or rows that break"
        " it"
    )
    return (
        f"none of {steps} steps had a finite loss and gradient{last}: nothing was trained, and no result"
        f" is saved; {fp16 if scaled else other}. Rows of bad steps: {folder / BAD_STEPS}"
    )


def conclude(history: list[Metrics], before: int, most: int, folder: Path, no_result: str) -> None:
    """The last thing of a run. Raises UserError, on all ranks, if there is nothing to save of it, or if bad
    steps ended it and what was trained until then is saved. Collective.

    Args:
        history: the steps that were made.
        before: the bad steps of a run that is resumed.
        most: --max_bad_steps.
        folder: the RUN.
        no_result: why there is no result, or "".
    """
    count = history[-1].bad_steps if history else before
    if no_result or too_many(count, most):
        dist.barrier()  # the first rank to fail ends the others: rank 0 must have written everything
    if no_result:
        raise UserError(no_result)
    if too_many(count, most):
        raise UserError(
            f"steps with a NaN or infinite loss or gradient: {count}, more than --max_bad_steps {most}; their rows are"
            f" in {folder / BAD_STEPS}. {_last_weights(history, before)}. A lower --lr helps where a run"
            " diverges"
        )


def _last_weights(history: list[Metrics], before: int) -> str:
    """Say which weights a run ends with, and how many steps were bad with them. Args: as for `conclude`."""
    good = [m for m in history if math.isfinite(m.loss) and math.isfinite(m.grad_norm)]
    known = (good[-1].bad_steps or 0) if good else before  # bad steps that came before these weights
    failed = ((history[-1].bad_steps or 0) if history else before) - known
    which = f"step {good[-1].step}, the last good one" if good else "the last good step"
    ended = f"The weights at the end are those after {which}"
    if not failed:
        return ended
    steps = "step" if failed == 1 else "steps"
    return f"{ended}; with them {failed} more {steps} gave NaN or infinity, so test them before use"
