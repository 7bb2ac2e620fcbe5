"""Make the next step's batches, and decode its images, while the current step computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch

from data.batches import Batch, Step
from data.image_batches import ImageBatch, PlannedImages
from data.pixels import read_pixels
from launch.devices import set_current_device
from options.errors import UserError


def load_images(batches: Sequence[Batch], threads: ThreadPoolExecutor) -> list[Batch]:
    """Return the batches with the pixels of their images. Raises UserError of the first one that is wrong."""
    planned = (batch.planned_images for batch in batches)
    wanted = [(ref, images.format) for images in planned if images for ref in images.refs]
    pixels = threads.map(lambda each: read_pixels(*each), wanted)
    return [_take_pixels(batch, pixels) for batch in batches]


def decode_images(planned: PlannedImages) -> ImageBatch:
    """Return planned images with their pixels. Raises UserError for one that cannot be read."""
    return planned.with_pixels([read_pixels(ref, planned.format) for ref in planned.refs])


def _take_pixels(batch: Batch, pixels: Iterator[torch.Tensor]) -> Batch:
    """Return the batch with the next of these pixels, which are those of its images."""
    planned = batch.planned_images
    if planned is None:
        return batch
    own = list(islice(pixels, len(planned.refs)))
    return dataclasses.replace(batch, planned_images=None, images=planned.with_pixels(own))


DATA = "data"  # name of the wait for a step in the traces of --profile


class PrefetchedSteps(Iterator[Step]):
    """Yields steps, on the CPU. A thread makes each while the one before it is in use.

    So the pixels of two steps are in memory, and of a third one while its predecessor is given away.

    Args:
        steps: the steps, with images that are only planned.
        thread_device: the thread's current device; nothing is copied there.
        pin: put batches into page-locked memory, from which copies to a GPU are asynchronous, if the host
            allows it.
        decoders: threads that decode images.
    """

    def __init__(self, steps: Iterator[Step], thread_device: torch.device, pin: bool, decoders: int = 1):
        self._steps, self._pin = steps, pin
        self._worker = ThreadPoolExecutor(1, initializer=set_current_device, initargs=(thread_device,))
        self._decoders = ThreadPoolExecutor(decoders)
        self._next: Future[Step | None] = self._worker.submit(self._make_next)

    def _make_next(self) -> Step | None:
        step = next(self._steps, None)
        if step is None:
            return None
        batches = load_images(step.batches, self._decoders)
        if self._pin:
            batches = [batch.pin_memory() for batch in batches]
            self._pin = all(batch.ids.is_pinned() for batch in batches)  # where refused, asking takes time
        return dataclasses.replace(step, batches=batches)

    def __next__(self) -> Step:
        with torch.profiler.record_function(DATA):
            step = self._next.result()
        if step is None:
            self.close()
            raise StopIteration
        self._next = self._worker.submit(self._make_next)
        return step

    def next_error(self) -> UserError | None:
        """Wait for the next step. Return why it cannot be made, if the user can correct that."""
        error = self._next.exception()
        return error if isinstance(error, UserError) else None

    def raise_next_error(self) -> None:
        """Wait for the next step. Raises UserError if it cannot be made."""
        if error := self.next_error():
            raise error

    def close(self) -> None:
        """End the threads."""
        self._worker.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)
