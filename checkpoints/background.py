"""Pauses a background thread, so that the training thread gets Python's interpreter for its kernel launches.

Python runs one thread at a time. It switches after 5 ms, or at once where a thread releases the interpreter,
which torch does in each operation. A thread that launches kernels therefore manages a tenth of its launches
while another computes in Python, and within a quarter of a second the GPU runs out of work. So the background
thread pauses most of the time.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import ItemsView, Iterator

# Seconds. Work costs training a sixth of the interpreter, which it can spare while it waits for a GPU.
# Shorter turns cost no less: each begins with cold processor caches.
WORK_SECONDS, PAUSE_SECONDS = 0.002, 0.01


class BackgroundThrottle:
    """Makes a background thread pause between short turns of work.

    Attributes:
        enabled: Whether to pause at all.
        hurry: Set while another thread waits for the work; then there are no pauses.
        paused_seconds: The sum of all pauses.
        turn_began: time.perf_counter() at the end of the last pause.
    """

    def __init__(self, enabled: bool):
        self.enabled, self.hurry, self.paused_seconds, self.turn_began = enabled, threading.Event(), 0.0, 0.0

    def freeze_gc(self) -> None:
        """If enabled, collect garbage now and exclude all objects that survive from later collections.

        Call before the first background work: its allocations trigger collections, which would scan a million
        lasting objects and block all threads for half a second.
        """
        if self.enabled:
            gc.collect()
            gc.freeze()

    def unfreeze_gc(self) -> None:
        """If enabled, let garbage collections include all objects again."""
        if self.enabled:
            gc.unfreeze()

    def pause_if_due(self) -> None:
        """If enabled and WORK_SECONDS after the last pause, wait PAUSE_SECONDS, or only until `hurry` is set.

        Call often within the work.
        """
        if self.enabled and (now := time.perf_counter()) - self.turn_began > WORK_SECONDS:
            self.hurry.wait(PAUSE_SECONDS)
            self.turn_began = time.perf_counter()
            self.paused_seconds += self.turn_began - now


class ThrottledDict(dict):
    """A dict whose items() pauses between items, for loops in other people's code.

    A profiler could interrupt any code, but slows down all threads from Python 3.12 on.
    """

    def __init__(self, items: dict, throttle: BackgroundThrottle):
        super().__init__(items)
        self.throttle = throttle

    def items(self) -> ItemsView:  # type: ignore[override] # as in other mappings
        return ThrottledItems(self)


class ThrottledItems(ItemsView):
    """The items of a ThrottledDict."""

    _mapping: ThrottledDict  # set by ItemsView

    def __iter__(self) -> Iterator[tuple]:
        for item in dict.items(self._mapping):
            self._mapping.throttle.pause_if_due()
            yield item
