"""A queue of callbacks, deferred until the GPU is busy; dropped when the run fails."""

from __future__ import annotations

from collections.abc import Callable

import torch

LOGGING = "logging"  # name of these calls in the traces of --profile


class DeferredCalls:
    """A deferred call and the calls that must follow it; the loop runs them once the GPU has work queued."""

    def __init__(self):
        self.calls: list[Callable[[], None]] = []

    def defer(self, call: Callable[[], None]) -> None:
        """Queue the first call. Raises AssertionError if the queue is not empty."""
        assert not self.calls
        self.calls.append(call)

    def run_after(self, call: Callable[[], None]) -> None:
        """Queue a call after the deferred ones; run it at once if there are none."""
        if self.calls:
            self.calls.append(call)
        else:
            call()

    def run_all(self) -> None:
        """Empty the queue and run the calls that were in it, in order."""
        calls, self.calls = self.calls, []
        with torch.profiler.record_function(LOGGING):
            for call in calls:
                call()
