"""Make the next step's batches while the current step computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from data.batches import Step
from launch.devices import set_current_device


def prefetch_steps(steps: Iterator[Step], thread_device: torch.device, pin: bool) -> Iterator[Step]:
    """Yield the steps, on the CPU. A thread makes each, and pins it, while the one before it is in use.

    Args:
        thread_device: the thread's current device; nothing is copied there.
        pin: put batches into page-locked memory, from which copies to a GPU are asynchronous, if the host
            allows it.
    """

    def make_next() -> Step | None:
        nonlocal pin
        step = next(steps, None)
        if step is None or not pin:
            return step
        batches = [batch.pin_memory() for batch in step.batches]
        pin = all(batch.ids.is_pinned() for batch in batches)  # where it is refused, asking takes time
        return dataclasses.replace(step, batches=batches)

    with ThreadPoolExecutor(1, initializer=set_current_device, initargs=(thread_device,)) as worker:
        next_step = worker.submit(make_next)
        while (step := next_step.result()) is not None:
            next_step = worker.submit(make_next)
            yield step
