"""Times the phases of an optimizer step, from which the time of a step with more micro-batches follows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from monitoring.memory_history import BETWEEN_STEPS


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the parts of an optimizer step.

    Attributes:
        inner: forward and backward of a micro-batch that another follows; with --no_sync it reduces no
            gradients.
        last: the same of the last micro-batch.
        optimizer: clipping and the optimizer's step.
    """

    inner: float
    last: float
    optimizer: float

    def total(self, micro_batches: int, steps: int = 1) -> float:
        """Return the seconds of so many steps, which have so many micro-batches together."""
        return (micro_batches - steps) * self.inner + steps * (self.last + self.optimizer)


class StepClock:
    """Marks the beginning of each phase, and computes the times of the last step from the marks.

    Args:
        now: now() returns a mark.
        seconds: seconds(mark, later mark) returns the time between them.
    """

    def __init__(self, now: Callable[[], Any], seconds: Callable[[Any, Any], float]):
        self.now, self.seconds = now, seconds
        self.marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Note that a phase begins, as `Profiler.start_phase` names it."""
        self.marks.append((phase, self.now()))

    def last_step(self) -> StepTimes | None:
        """Return the times of the last step that ended; None if there is none."""
        phases = [phase for phase, _ in self.marks]
        if "optimizer" not in phases:
            return None
        marks = [mark for _, mark in self.marks]
        optimizer = len(phases) - 1 - phases[::-1].index("optimizer")
        before = max((i for i in range(optimizer) if phases[i] == BETWEEN_STEPS), default=-1)
        begins = [i for i in range(before + 1, optimizer) if phases[i] == "forward"]
        last = self.seconds(marks[begins[-1]], marks[optimizer])
        inner = self.seconds(marks[begins[-2]], marks[begins[-1]]) if len(begins) > 1 else last
        return StepTimes(inner, last, self.seconds(marks[optimizer], marks[optimizer + 1]))


def make_step_clock(device: torch.device) -> StepClock:
    """Return a clock of the device: on a GPU, events on its stream, for which no phase has to wait."""
    if device.type != "cuda":
        return StepClock(time.perf_counter, lambda begin, end: end - begin)

    def record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return StepClock(record, seconds)
