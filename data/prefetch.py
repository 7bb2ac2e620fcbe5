"""The next step's batches are made while the current one computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from data.batches import Step
from launch.devices import set_current_device


def ahead(steps: Iterator[Step], device: torch.device, pin: bool) -> Iterator[Step]:
    """The same steps, each made by a thread while the one before it is in use. pin: batches in page-locked
    memory, from which copies to `device`, a GPU, wait for nothing."""

    def make() -> Step | None:
        step = next(steps, None)
        if step is None or not pin:
            return step
        return dataclasses.replace(step, batches=[batch.pinned() for batch in step.batches])

    with ThreadPoolExecutor(1, initializer=set_current_device, initargs=(device,)) as worker:
        upcoming = worker.submit(make)
        while (step := upcoming.result()) is not None:
            upcoming = worker.submit(make)
            yield step
