"""Metrics of each optimizer step, over all ranks: measured by `Meter`, and read back from metrics.jsonl.

Each rank's numbers of a step become a row of a table [ranks, columns]. Its columns: the rank's share of the
loss, the gradient's norm, bytes allocated and reserved at the step's peak, and bytes in use after forward and
after backward where these were measured. The table is on its way to the host while the GPU goes on.
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
from options.errors import UserError
from options.limits import MAX_METRICS_LINE_BYTES

GIB = 2**30


@dataclass(frozen=True)
class Metrics:
    """One optimizer step, over all ranks. tokens: real ones, padding not counted; trained_tokens: the
    targets among them; memory: of the rank that has most, GPU peak of this step (on CPU, the process's
    largest resident size so far), and what was in use when the last forward and the last backward of the step
    ended. eval_loss: mean over the targets of the evaluation set, after this step, and
    eval_perplexity its exponential, where the step was evaluated. bad_steps: steps skipped so far, if any;
    applied_steps: steps so far that changed the weights, which is not in metrics.jsonl."""

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
    bad_steps: int | None = None
    applied_steps: int | None = None

    def fields(self) -> dict[str, int | float]:
        """What metrics.jsonl says of the step, by name; without what the step does not have."""
        fields = dataclasses.asdict(self)
        del fields["applied_steps"]
        return {k: v for k, v in fields.items() if v is not None}


class HostMoment:
    """What a torch.cuda.Event is to a GPU's work, of the host's, which is done when it is there."""

    def __init__(self):
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: HostMoment) -> float:
        """In milliseconds."""
        return (later.at - self.at) * 1000


Moment = torch.cuda.Event | HostMoment


def moment(device: torch.device) -> Moment:
    """When the device is through with what is queued now."""
    if device.type != "cuda":
        return HostMoment()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class Reading:
    """What all ranks read of an optimizer step, the index-th from 1, on its way to the host. table: [ranks, columns] fp64
    on the host, filled at the moment `copied`; finite: whether the loss and the gradient's norm are, a scalar on the
    device."""

    index: int
    step: Step
    lr: float
    table: torch.Tensor
    copied: Moment
    finite: torch.Tensor

    def wait(self) -> torch.Tensor:
        """The table. Waits for the GPU."""
        self.copied.synchronize()
        return self.table

    def loss(self) -> float:
        return self.wait()[:, 0].sum().item()

    def grad_norm(self) -> float:
        return self.wait()[0, 1].item()


@dataclass(frozen=True)
class Lap:
    """From the end of a step, or of what `Meter.restart` leaves out, to the end of the next step."""

    began: Moment
    ended: Moment

    def seconds(self) -> float:
        """Waits for the GPU."""
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1000  # type: ignore[arg-type] # both are of one device


class Meter:
    """Measures steps on every rank."""

    def __init__(self, device: torch.device, held: dict[str, int]):
        """held: bytes in use after each phase, kept up to date by a Profiler."""
        self.device, self.held = device, held
        self.restart()

    def read(self, index: int, step: Step, lr: float, loss: torch.Tensor, grad_norm: torch.Tensor) -> Reading:
        """loss: this rank's share of the step's mean loss. Collective. Waits for nothing."""
        # With --use_cpu_offload the norm is on the CPU.
        mine = torch.stack([loss.double(), grad_norm.to(self.device).double(), *self._memory()])
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, mine)
        table = torch.stack(ranks)
        finite = (table[:, 0].sum() + table[0, 1]).isfinite()
        host = table.to("cpu", non_blocking=True)
        return Reading(index, step, lr, host, moment(self.device), finite)

    def lap(self) -> Lap:
        """The step's time, once the optimizer's step is queued. Waits for nothing."""
        began = self.last
        self.restart()
        return Lap(began, self.last)

    def measure(self, reading: Reading, lap: Lap) -> Metrics:
        """The loop's one wait for the GPU. What is queued behind the two goes on meanwhile."""
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
            **phases,
        )

    def _phases(self) -> list[tuple[int, str]]:
        """(its column, its name) of the phases that were measured."""
        return list(enumerate((p for p in ("forward", "backward") if p in self.held), start=4))

    def restart(self) -> None:
        """Leaves out of the next step's time what was done since the last one; its memory still counts."""
        self.last = moment(self.device)

    def _memory(self) -> list[torch.Tensor]:
        gpu = self.device.type == "cuda"
        peaks = memory.PEAK_MEMORY.pop_step_peak() if gpu else (memory.peak_resident_bytes(),) * 2
        sizes = *peaks, *(self.held[p] for _, p in self._phases())
        # Not torch.tensor, which copies from the host and waits until the GPU has come to it.
        return [torch.full((), size, dtype=torch.float64, device=self.device) for size in sizes]


def read_metrics(path: Path, length: int | None = None) -> list[Metrics]:
    """The lines of metrics.jsonl, one for each step so far; length: bytes of it that are read, None = all. Raises
    UserError where it holds anything else."""
    found: list[Metrics] = []
    with path.open("rb") as file:
        while (length is None or file.tell() < length) and (line := file.readline(MAX_METRICS_LINE_BYTES)):
            number = len(found) + 1
            try:
                values: dict[str, Any] = {
                    k: math.nan if v is None else v for k, v in json.loads(line).items()
                }
                found.append(Metrics(**values))
                right = found[-1].step == number and all(type(v) in (int, float) for v in values.values())
            except (ValueError, TypeError, AttributeError, RecursionError):
                right = False
            if not right:
                raise UserError(f"{path}: line {number} is not as a run writes it")
    return found


def too_many(count: int | None, most: int) -> bool:
    """Whether --max_bad_steps ends a run with so many skipped steps."""
    return 0 <= most < (count or 0)
