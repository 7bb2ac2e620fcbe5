"""A queue of callbacks, deferred until the GPU is busy; dropped when the run fails."""

from __future__ import annotations

from collections.abc import Callable


class DeferredCalls:
    """One deferred call, and those that follow it. The loop makes them once the GPU has work queued."""

    def __init__(self):
        self.calls: list[Callable[[], None]] = []

    def put(self, call: Callable[[], None]) -> None:
        assert not self.calls
        self.calls.append(call)

    def then(self, call: Callable[[], None]) -> None:
        """Has a call follow the one that waits; makes it at once where none does."""
        if self.calls:
            self.calls.append(call)
        else:
            call()

    def now(self) -> None:
        """Makes the calls, if there are any."""
        calls, self.calls = self.calls, []
        for call in calls:
            call()
