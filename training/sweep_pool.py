"""Several trials at a time in one process: a thread for each, and the signals that stop them."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from launch.signals import SAME_REQUEST_SECONDS, STOPS

STOPPING = "stopping: each run finishes its step and writes a checkpoint; Ctrl-C again ends the runs at once"
WAKE_SECONDS = 0.5  # Python runs signal handlers only between waits of the main thread


class Stop:
    """A request to stop the sweep; signal handlers make it, and all workers of the process see it.

    Attributes:
        count: number of requests. As in launch/signals.py, those within a second are one: a scheduler may
            signal a process twice.
    """

    def __init__(self):
        self.count, self._last, self._event = 0, -math.inf, threading.Event()

    def request(self, *_) -> None:
        """Ask for the stop; a second request ends the runs at once. Takes a signal handler's arguments."""
        now = time.monotonic()
        self.count += now - self._last >= SAME_REQUEST_SECONDS
        self._last = now
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Wait for a request, at most this long. Return whether there was one."""
        return self._event.wait(seconds)


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """Yield the request to stop that SIGINT and SIGTERM make, within the context."""
    stop = Stop()
    before = {number: signal.signal(number, stop.request) for number in STOPS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_in_threads(works: list[Callable[[], None]], stop: Stop) -> None:
    """Call all `works`, each in a thread of its own. The first error stops the others, and is raised.

    Prints a line at the first request to stop: until the runs have ended nothing else would show it.
    """
    is_announced = False
    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(work) for work in works]
        while True:
            done, running = wait(futures, timeout=WAKE_SECONDS, return_when=FIRST_EXCEPTION)
            failed = [future for future in done if future.exception()]
            if stop.count and not is_announced:
                print(STOPPING, flush=True)
                is_announced = True
            if failed:
                stop.request()
            if not running or failed:
                break
    for future in futures:
        future.result()
