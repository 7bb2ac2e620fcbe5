"""Work of a thread beside the one that trains, which needs the interpreter for each kernel that it launches.

Python lets one thread at a time run, takes turns after 5 ms, and gives the next turn at once where a thread lets go by
itself, as torch does for each operation. So one that launches kernels comes to a tenth of its launches beside another
that computes in Python, and the GPU runs out of work in a quarter of a second. Here the other one rests most of the time.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

# Seconds. The turns cost training a sixth of the interpreter, which it can spare where it waits for a GPU; shorter ones
# cost no less, as each begins with what the processor has forgotten meanwhile.
TURN, REST = 0.002, 0.01


class Background:
    """rests: whether it is to rest at all; hurry: set while somebody waits for the work; rested: seconds, since the last
    `turns`."""

    def __init__(self, rests: bool):
        self.rests, self.hurry, self.rested = rests, threading.Event(), 0.0

    @contextlib.contextmanager
    def turns(self) -> Iterator[None]:
        """Within, the thread rests after each TURN, unless there is a hurry. Where a profiler watches it, it is left
        alone: the only way to interrupt other people's Python is the one by which that watches."""
        self.rested = 0.0
        if not self.rests or sys.getprofile():
            yield
            return
        began = time.perf_counter()

        def rest(*_) -> None:
            nonlocal began
            if (now := time.perf_counter()) - began > TURN:
                self.hurry.wait(REST)
                began = time.perf_counter()
                self.rested += began - now

        sys.setprofile(rest)
        try:
            yield
        finally:
            sys.setprofile(None)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within, the thread does not rest: for work during which Python is let go of anyway, as files and digests are. By the
    clock, which is all that `turns` has, it would take six times as long."""
    rest = sys.getprofile()
    if getattr(rest, "__module__", None) != __name__:  # somebody else watches, or nobody
        yield
        return
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(rest)
