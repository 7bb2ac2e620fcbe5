"""Bad steps: those whose loss or gradient is NaN or infinite.

They do not change the weights, are counted, and end the run when there are too many. The criterion is the
same on every rank, so all ranks skip a step together. With fp16, the loss scale is too high at first on
purpose. An overflow of the scaled gradient is then no bad step: the scaler skips the step itself, and lowers
the scale.
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
from monitoring.metrics import Metrics, Reading, exceeds_bad_steps
from monitoring.tracking import NoTracker
from options.errors import UserError

BAD_STEPS = "bad_steps.jsonl"
FP16_OVERFLOW = (
    "fp16, whose largest number is 65,504, overflows in many models that were trained in bf16: try"
    " --precision fp32, or bf16 on a GPU that has it"
)


class ResumedProgress(NamedTuple):
    """The progress of a run before it was resumed."""

    steps: int = 0  # optimizer steps
    bad: int = 0  # bad steps among them
    applied: int = 0  # steps that changed the weights


def resumed_from(step: int, state: dict) -> ResumedProgress:
    """Return the progress at a checkpoint of optimizer step `step`. state: its state of `BadStepGuard`."""
    bad = state["count"]
    return ResumedProgress(step, bad, state.get("applied", step - bad))  # older checkpoints have no "applied"


class BadStepGuard:
    """Checks every step, and skips the bad ones.

    Attributes:
        count: bad steps so far, all skipped.
        applied: steps that changed the weights. Steps that fp16's scaler skips itself did not.
        should_stop: more than max_bad_steps steps were bad.

    Args:
        done: optimizer steps of a resumed run before it was resumed.
        max_bad_steps: bad steps before the run ends (--max_bad_steps); -1 = any number.
        rows: the run's rows, for their numbers in --dataset.
        folder: the RUN.
        scaler: the loop's gradient scaler. A step that it skips because of its scale is no bad step.
        rank: rank 0 writes bad_steps.jsonl.
        tracker: prints a line for each bad step.
    """

    def __init__(
        self,
        *,
        done: int,
        max_bad_steps: int,
        rows: TokenizedRows,
        folder: Path,
        scaler: torch.amp.GradScaler,
        rank: int,
        tracker: NoTracker,
    ):
        self.done, self.max_bad_steps, self.rows = done, max_bad_steps, rows
        self.scaler, self.tracker = scaler, tracker
        self.file = folder / BAD_STEPS if rank == 0 else None
        self.count, self.applied, self.should_stop = 0, 0, False
        # The schedule counts a skipped step too, also the first, which fp16 often skips.
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")

    def step(self, optimizer: torch.optim.Optimizer, reading: Reading) -> None:
        """Call the optimizer's step, or skip it if this step's loss or gradient is NaN or infinite.

        A fused optimizer gets the decision on the GPU, and the host does not wait. Any other optimizer waits
        for the reading.
        """
        is_fused = getattr(optimizer, "_step_supports_amp_scaling", False) and not self.scaler.is_enabled()
        # With parameters on the host (--use_cpu_offload), torch would fetch found_inf without waiting for it.
        if is_fused and optimizer.param_groups[0]["params"][0].device.type == reading.finite.device.type:
            # GradScaler sets the same attribute for fused optimizers.
            optimizer.found_inf = 1 - reading.finite.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif self._is_good(reading.loss(), reading.grad_norm()):
            self.scaler.step(optimizer)

    def needs_metrics(self) -> bool:
        """Return whether `check_step` must run before the next step begins.

        The metrics may end the run, or the scaler depends on them.
        """
        return self.scaler.is_enabled() or exceeds_bad_steps(self.count + 1, self.max_bad_steps)

    def check_step(self, metrics: Metrics, step: Step) -> Metrics:
        """Count a step; if it is bad, print and record it. Return the metrics with the counts.

        Call it after the optimizer's step, before the scaler's update.
        """
        if not self._is_good(metrics.loss, metrics.grad_norm):
            self.count += 1
            self.should_stop = exceeds_bad_steps(self.count, self.max_bad_steps)
            self._report(metrics, step)
        self.applied += math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)
        return dataclasses.replace(metrics, bad_steps=self.count or None, applied_steps=self.applied)

    def state_dict(self) -> dict:
        return {"count": self.count, "applied": self.applied}

    def load_state_dict(self, state: dict) -> None:
        _, self.count, self.applied = resumed_from(self.done, state)
        self.should_stop = exceeds_bad_steps(self.count, self.max_bad_steps)

    def _is_good(self, loss: float, grad_norm: float) -> bool:
        return math.isfinite(loss) and (math.isfinite(grad_norm) or self._is_scaling())

    def _is_scaling(self) -> bool:
        """Return whether the gradient may have overflowed only because it was scaled."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def _report(self, metrics: Metrics, step: Step) -> None:
        """On rank 0, print a line on a bad step, and append one to bad_steps.jsonl with the step's rows.

        Rows are numbers in --dataset, from 1; in a mixture texts such as "3 of rows.jsonl". JSON has no NaN,
        so loss and norm are strings.
        """
        if not self.file:
            return
        loss, norm = f"{metrics.loss:.6g}", f"{metrics.grad_norm:.6g}"
        line = {
            "step": metrics.step,
            "epoch": metrics.epoch,
            "loss": loss,
            "grad_norm": norm,
            "rows": [self.rows.row_name(i) for i in step.rows.sort().values.tolist()],
        }
        append_lines(self.file, json.dumps(line) + "\n", self.tracker.print_line)
        self.tracker.print_line(
            f"step {metrics.step} skipped: loss {loss}, gradient norm {norm}; its rows: {self.file}"
        )


def describe_no_good_step(
    history: list[Metrics], resumed: ResumedProgress, is_scaled: bool, folder: Path
) -> str:
    """Return an error line if no step of the run changed a weight, else "". The same on all ranks.

    Args:
        history: metrics of the steps after the run was resumed.
        resumed: its progress before that.
        is_scaled: whether the loss is scaled, for fp16.
        folder: the RUN.
    """
    if history[-1].applied_steps if history else resumed.applied:
        return ""
    steps = resumed.steps + len(history)
    last = f"; of the last one, {history[-1].loss:.6g} and {history[-1].grad_norm:.6g}" if history else ""
    fp16 = (
        f"{FP16_OVERFLOW}; where only the gradient is infinite, its scale is halved at each step, and more"
        " steps may do"
    )
    other = (
        "look for a config.json that does not belong to the weights (a norm's eps, RoPE), or rows that break"
        " it"
    )
    return (
        f"none of {steps} steps had a finite loss and gradient{last}: nothing was trained, and no result"
        f" is saved; {fp16 if is_scaled else other}. Rows of bad steps: {folder / BAD_STEPS}"
    )


def raise_if_failed(
    history: list[Metrics],
    resumed_bad: int,
    max_bad_steps: int,
    folder: Path,
    no_result: str,
    is_scaled: bool = False,
) -> None:
    """Raise UserError on all ranks if `no_result`, or if bad steps ended the run. Collective.

    It is the last call of a run: the weights of a run that bad steps ended are saved by then.

    Args:
        history: metrics of the steps after the run was resumed.
        resumed_bad: bad steps before that.
        max_bad_steps: --max_bad_steps.
        folder: the RUN.
        no_result: why there is no result, or "".
        is_scaled: whether the loss is scaled, for fp16.
    """
    count = history[-1].bad_steps if history else resumed_bad
    if no_result or exceeds_bad_steps(count, max_bad_steps):
        dist.barrier()  # the first rank to fail ends the others: rank 0 must have written everything
    if no_result:
        raise UserError(no_result)
    if exceeds_bad_steps(count, max_bad_steps):
        overflowed = is_scaled and not math.isfinite(history[-1].loss if history else math.nan)
        advice = FP16_OVERFLOW if overflowed else "A lower --lr helps where a run diverges"
        raise UserError(
            "steps with a NaN or infinite loss or gradient:"
            f" {count}, more than --max_bad_steps {max_bad_steps}; their rows are in {folder / BAD_STEPS}."
            f" {_describe_last_weights(history, resumed_bad)}. {advice}"
        )


def _describe_last_weights(history: list[Metrics], resumed_bad: int) -> str:
    """Return a sentence on which step made a run's last weights, and how many bad steps followed it."""
    good = [m for m in history if math.isfinite(m.loss) and math.isfinite(m.grad_norm)]
    bad_before = (good[-1].bad_steps or 0) if good else resumed_bad
    bad_after = ((history[-1].bad_steps or 0) if history else resumed_bad) - bad_before
    which = f"step {good[-1].step}, the last good one" if good else "the last good step"
    ended = f"The weights at the end are those after {which}"
    if not bad_after:
        return ended
    steps = "step" if bad_after == 1 else f"{bad_after} steps"
    return f"{ended}; the {steps} after it gave NaN or infinity, so test the result before use"
