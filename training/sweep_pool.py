"""Several trials at a time in one process: a thread for each, and the signals that stop them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from launch.signals import STOPS
from training.sweep_trial import Stop

WAKE_SECONDS = 0.5  # Python runs signal handlers only between waits of the main thread


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
    """Call all `works`, each in a thread of its own. The first error stops the others, and is raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(work) for work in works]
        while True:
            done, running = wait(futures, timeout=WAKE_SECONDS, return_when=FIRST_EXCEPTION)
            failed = [future for future in done if future.exception()]
            if failed:
                stop.request()
            if not running or failed:
                break
    for future in futures:
        future.result()
