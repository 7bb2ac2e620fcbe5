"""Work of a thread beside the one that trains, which needs the interpreter for each kernel that it launches.

Python lets one thread at a time run, takes turns after 5 ms, and gives the next turn at once where a thread lets go by
itself, as torch does for each operation. So one that launches kernels comes to a tenth of its launches beside another
that computes in Python, and the GPU runs out of work in a quarter of a second. Here the other one rests most of the time.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import ItemsView, Iterator

# Seconds. The turns cost training a sixth of the interpreter, which it can spare where it waits for a GPU; shorter ones
# cost no less, as each begins with what the processor has forgotten meanwhile.
TURN, REST = 0.002, 0.01


class Background:
    """rests: whether it is to rest at all; hurry: set while somebody waits for the work; rested: seconds in all; began:
    when the last rest ended."""

    def __init__(self, rests: bool):
        self.rests, self.hurry, self.rested, self.began = rests, threading.Event(), 0.0, 0.0

    def prepare(self) -> None:
        """To be called before the first work, when all is there that stays: what the work makes would have Python's
        collector look through a million objects, for which all threads wait half a second."""
        if self.rests:
            gc.collect()
            gc.freeze()

    def finish(self) -> None:
        """The collector looks through everything again."""
        if self.rests:
            gc.unfreeze()

    def rest(self) -> None:
        """To be called often within the work: rests if a TURN is over, unless there is a hurry."""
        if self.rests and (now := time.perf_counter()) - self.began > TURN:
            self.hurry.wait(REST)
            self.began = time.perf_counter()
            self.rested += self.began - now


class Resting(dict):
    """A dict for other people's loops: whoever goes through its items rests between them. (A profiler, which could
    interrupt any code, slows all threads from Python 3.12 on.)"""

    def __init__(self, items: dict, background: Background):
        super().__init__(items)
        self.background = background

    def items(self) -> ItemsView:  # type: ignore[override] # as in other mappings
        return RestingItems(self)


class RestingItems(ItemsView):
    _mapping: Resting  # which ItemsView sets

    def __iter__(self) -> Iterator[tuple]:
        for item in dict.items(self._mapping):
            self._mapping.background.rest()
            yield item
