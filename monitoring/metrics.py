"""Metrics of each optimizer step over all ranks: measured by `Meter`, and read back from metrics.jsonl.

Each rank's numbers of a step are a row of a table [ranks, columns]. Its columns: the rank's share of the
loss, the gradient's norm, bytes allocated and reserved at the step's peak, and, if they were measured, bytes
in use after forward and after backward; the last one, if there is such a loss, is the rank's share of the
routers' auxiliary loss. The table is copied to the host while the GPU goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.batches import Step
from launch import memory
from launch.memory import GIB
from options.errors import UserError
from options.limits import MAX_METRICS_LINE_BYTES


@dataclass(frozen=True)
class Metrics:
    """One optimizer step over all ranks: a line of metrics.jsonl, by field name.

    Memory is that of the rank that has most.

    Attributes:
        tokens: without padding.
        trained_tokens: the targets among them.
        memory_allocated_gib, memory_reserved_gib: the GPU's peak in this step; on a CPU, the process's
            largest resident size so far.
        memory_after_forward_gib, memory_after_backward_gib: in use when the last one of the step ended.
        eval_loss: mean over the targets of the evaluation set after this step, if it was evaluated.
        eval_perplexity: its exponential.
        images: of the step, if any; images / step_seconds is the tower's speed.
        router_aux_loss: the auxiliary loss of routers, if the model's config asks for it; not part of `loss`.
        bad_steps: steps skipped so far, if any.
        applied_steps: steps so far that changed the weights; not in metrics.jsonl.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    step_seconds: float
    tokens_per_second: float
    memory_allocated_gib: float
    memory_reserved_gib: float
    memory_after_forward_gib: float | None = None
    memory_after_backward_gib: float | None = None
    eval_loss: float | None = None
    eval_perplexity: float | None = None
    images: int | None = None
    router_aux_loss: float | None = None
    bad_steps: int | None = None
    applied_steps: int | None = None

    def fields(self) -> dict[str, int | float]:
        """Return the values for metrics.jsonl, by name, without those that the step does not have."""
        fields = dataclasses.asdict(self)
        del fields["applied_steps"]
        return {k: v for k, v in fields.items() if v is not None}


class HostEvent:
    """A torch.cuda.Event's counterpart for the host's work, which is done when the event is created."""

    def __init__(self):
        self.seconds = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: HostEvent) -> float:
        """Return the milliseconds from this event to the later one."""
        return (later.seconds - self.seconds) * 1000


Event = torch.cuda.Event | HostEvent


def record_event(device: torch.device) -> Event:
    """Return an event that is complete when the device has finished all work queued so far."""
    if device.type != "cuda":
        return HostEvent()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class Reading:
    """The numbers of an optimizer step over all ranks, being copied to the host.

    Attributes:
        index: the optimizer step, from 1.
        table: [ranks, columns] fp64 on the host; complete at the event `copied`.
        finite: whether the loss and the gradient's norm are finite; a scalar on the device.
        has_router_loss: whether the table's last column is the auxiliary loss of routers.
    """

    index: int
    step: Step
    lr: float
    table: torch.Tensor
    copied: Event
    finite: torch.Tensor
    has_router_loss: bool = False

    def wait(self) -> torch.Tensor:
        """Return the table. Waits for the GPU."""
        self.copied.synchronize()
        return self.table

    def loss(self) -> float:
        """Return the step's mean loss over all ranks. Waits for the GPU."""
        return self.wait()[:, 0].sum().item()

    def grad_norm(self) -> float:
        """Return the gradient's norm. Waits for the GPU."""
        return self.wait()[0, 1].item()

    def router_loss(self) -> float | None:
        """Return the auxiliary loss of routers over all ranks; None without one. Waits for the GPU."""
        return self.wait()[:, -1].sum().item() if self.has_router_loss else None


@dataclass(frozen=True)
class Lap:
    """The time from the end of a step, or from `Meter.restart`, to the end of the next step."""

    start: Event
    end: Event

    def seconds(self) -> float:
        """Return the duration. Waits for the GPU."""
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1000  # type: ignore[arg-type] # both are of one device


class Meter:
    """Measures steps on every rank."""

    def __init__(self, device: torch.device, phase_bytes: dict[str, int]):
        """phase_bytes: bytes in use after each phase; a Profiler updates it."""
        self.device, self.phase_bytes = device, phase_bytes
        self.restart()

    def read(
        self,
        index: int,
        step: Step,
        lr: float,
        local_loss: torch.Tensor,
        grad_norm: torch.Tensor,
        local_router_loss: torch.Tensor | None = None,
    ) -> Reading:
        """Gather a step's numbers of all ranks and start copying them to the host. Collective.

        Waits for nothing.

        Args:
            index: the optimizer step, from 1.
            step: this optimizer step's batches.
            lr: its learning rate.
            local_loss: this rank's share of the step's mean loss; the shares add up to it.
            grad_norm: the norm of the whole gradient, equal on all ranks.
            local_router_loss: this rank's share of the step's auxiliary loss, if there is one.
        """
        # With --use_cpu_offload the norm is on the CPU.
        numbers = [local_loss.double(), grad_norm.to(self.device).double(), *self._memory()]
        if local_router_loss is not None:
            numbers.append(local_router_loss.double())
        local = torch.stack(numbers)
        ranks = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, local)
        table = torch.stack(ranks)
        finite = (table[:, 0].sum() + table[0, 1]).isfinite()
        host = memory.copy_to_host(table)
        has_router_loss = local_router_loss is not None
        return Reading(index, step, lr, host, record_event(self.device), finite, has_router_loss)

    def lap(self) -> Lap:
        """End the current lap, return it, and start the next. Waits for nothing.

        Call it once the optimizer's step is queued.
        """
        start = self.last
        self.restart()
        return Lap(start, self.last)

    def measure(self, reading: Reading, lap: Lap) -> Metrics:
        """Return the step's metrics. The loop's only wait for the GPU; work queued later goes on."""
        table, seconds, step = reading.wait(), lap.seconds(), reading.step
        phases: dict[str, Any] = {
            f"memory_after_{p}_gib": table[:, i].max().item() / GIB for i, p in self._phases()
        }
        return Metrics(
            step=reading.index,
            epoch=round(step.epoch, 4),
            loss=reading.loss(),
            lr=reading.lr,
            grad_norm=reading.grad_norm(),
            tokens=step.n_tokens,
            trained_tokens=step.n_targets,
            step_seconds=seconds,
            tokens_per_second=step.n_tokens / seconds,
            memory_allocated_gib=table[:, 2].max().item() / GIB,
            memory_reserved_gib=table[:, 3].max().item() / GIB,
            images=step.n_images or None,
            router_aux_loss=reading.router_loss(),
            **phases,
        )

    def _phases(self) -> list[tuple[int, str]]:
        """Return (column, name) of the phases that were measured."""
        return list(enumerate((p for p in ("forward", "backward") if p in self.phase_bytes), start=4))

    def restart(self) -> None:
        """Exclude the time since the last step from the next step's time; its memory still counts."""
        self.last = record_event(self.device)

    def _memory(self) -> list[torch.Tensor]:
        """Return this rank's columns of memory as fp64 scalars on the device; the step's peak begins anew."""
        peaks = (
            memory.PEAK_MEMORY.pop_step_peak()
            if self.device.type == "cuda"
            else (memory.peak_resident_bytes(),) * 2
        )
        sizes = *peaks, *(self.phase_bytes[p] for _, p in self._phases())
        # torch.tensor would copy from the host, and wait until the GPU reaches the copy.
        return [torch.full((), size, dtype=torch.float64, device=self.device) for size in sizes]


def read_metrics(path: Path, length: int | None = None) -> list[Metrics]:
    """Return the Metrics in metrics.jsonl, one for each step so far; `length` bytes of it, None = all.

    Raises UserError if a line is not as a run writes it.
    """
    found: list[Metrics] = []
    with path.open("rb") as file:
        while (length is None or file.tell() < length) and (line := file.readline(MAX_METRICS_LINE_BYTES)):
            number = len(found) + 1
            try:
                values: dict[str, Any] = {
                    k: math.nan if v is None else v for k, v in json.loads(line).items()
                }
                found.append(Metrics(**values))
                is_valid = found[-1].step == number and all(type(v) in (int, float) for v in values.values())
            except (ValueError, TypeError, AttributeError, RecursionError):
                is_valid = False
            if not is_valid:
                raise UserError(f"{path}: line {number} is damaged: no run writes it so")
    return found


def exceeds_bad_steps(count: int | None, max_bad_steps: int) -> bool:
    """Return whether --max_bad_steps ends a run that skipped `count` steps."""
    return 0 <= max_bad_steps < (count or 0)
