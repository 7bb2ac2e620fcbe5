"""Requests to stop or to save: signals, time limits, and data that cannot be read.

SIGTERM, SIGINT   first: finish the step, write a checkpoint, end the run with status 0;
                  second, a second or more later: end the run at once
SIGUSR1           write a checkpoint and go on

Two stops within a second count as one: a terminal's Ctrl-C and Slurm's signals go to all processes of a
group, and the launcher may send its ranks the same signal again. A SIGUSR1 within a second after the
checkpoint that one asked for counts as the same request: it may reach one rank before the end of a step and
another rank after it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

import torch
import torch.distributed as dist

from launch.ranks import gather_from_ranks, max_over_ranks
from options.errors import UserError, describe

STOPS = (signal.SIGTERM, signal.SIGINT)
SAVE = signal.SIGUSR1
SAME_REQUEST_SECONDS = 1.0  # signals that come closer together than this are one request


class ReceivedSignals:
    """The signals that this process has received.

    Attributes:
        stop: the first of STOPS, or None.
        save: whether SAVE has come since the last checkpoint that it asked for.
        on_second_stop: on_second_stop(signal) is called for a second stop.
    """

    def __init__(self, on_second_stop):
        self.stop: signal.Signals | None = None
        self.save, self.on_second_stop, self._first_stop = False, on_second_stop, 0.0
        self._acknowledged = float("-inf")

    def handle(self, number: int, _frame=None) -> None:
        """Record a signal, as its handler; a second stop calls on_second_stop instead."""
        if number == SAVE:
            self.save = time.monotonic() - self._acknowledged >= SAME_REQUEST_SECONDS
        elif self.stop is None:
            self.stop, self._first_stop = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._first_stop >= SAME_REQUEST_SECONDS:
            self.on_second_stop(signal.Signals(number))

    def acknowledge_save(self) -> None:
        """Mark SAVE as answered, also one that reaches this rank within the next second."""
        self._acknowledged = time.monotonic()
        self.save = False


class NoStopRequests:
    """Null object of `StopRequests`: nothing is ever requested.

    Attributes:
        reason: why the run has to stop, or "".
        error: this rank's error about data that it cannot read, once known.
        data_error: the line about data that cannot be read, if that is why; the same on all ranks.
    """

    reason = data_error = ""
    error: UserError | None = None

    def watch_data(self, next_error: Callable[[], UserError | None]) -> None:
        """Stop when the next step's data cannot be read.

        next_error: waits for that data, and returns the error or None.
        """

    def stop_if_unreadable(self) -> contextlib.AbstractContextManager:
        """Return a context for reading data besides that of a step. Here its errors end the run at once."""
        return contextlib.nullcontext()

    def poll_all_ranks(self, last: bool) -> tuple[bool, bool]:
        """Return (whether to stop after this step, whether to save a checkpoint): (False, False) here.

        last: whether the run ends after this step anyway.
        """
        return False, False

    def expect_save(self, seconds: float) -> None:
        """Set how long a checkpoint is expected to take. It counts until the first one has been written."""

    def record_save(self, seconds: float, complete: bool = True) -> None:
        """Record how long a checkpoint took to write or, if not complete, how long it has taken so far."""


NO_STOP_REQUESTS = NoStopRequests()


class StopRequests(NoStopRequests):
    """Requests to stop or save, from signals and from the clock. It installs this process's signal handlers.

    Every rank has one: ranks may receive different signals at different moments, but must stop after the same
    step.

    Args:
        rank: this rank. Only rank 0's clock counts.
        started: time.time() when the run started.
        max_minutes, save_minutes: as the options; 0 = none.
    """

    def __init__(self, rank: int, started: float, max_minutes: float, save_minutes: float):
        self.rank, self.save_seconds = rank, save_minutes * 60
        self.deadline = started + max_minutes * 60 if max_minutes else float("inf")
        self.last_save = self.last_step = time.time()
        self.longest_step = self.longest_save = self.expected_save = 0.0
        self.received = ReceivedSignals(on_second_stop=_exit_now)
        self.next_error: Callable[[], UserError | None] = lambda: None
        for number in (*STOPS, SAVE):
            signal.signal(number, self.received.handle)

    def watch_data(self, next_error: Callable[[], UserError | None]) -> None:
        self.next_error = next_error

    @contextlib.contextmanager
    def stop_if_unreadable(self) -> Iterator[None]:
        """Within the context, turn a UserError about data into a request to stop after this step."""
        try:
            yield
        except UserError as e:
            self.error = e

    def poll_all_ranks(self, last: bool) -> tuple[bool, bool]:
        """Return (whether to stop, whether to save), from all ranks' signals and rank 0's clock. Collective.

        Data for the next step that some rank cannot read asks to stop, too. On the last step only data that
        an evaluation or a sample could not read does: otherwise the run ends by itself.
        """
        received = self.received
        if not last and not self.error:
            self.error = self.next_error()
        flags = (received.save, *self._check_clock(), self.error is not None)
        requests = torch.tensor([received.stop or 0, *flags], dtype=torch.int64)
        stop, save, out_of_time, save_due, failed = max_over_ranks(requests).tolist()
        if save:
            received.acknowledge_save()
        if save_due:
            self.last_save = time.time()
        if last and not failed:
            return False, bool(save or save_due)
        self.reason = signal.Signals(stop).name if stop else "--max_minutes" if out_of_time else ""
        if failed:
            lines = gather_from_ranks(describe(self.error) if self.error else "", dist.get_world_size())
            self.reason, self.data_error = "data that cannot be read", next(filter(None, lines))
        return bool(self.reason), bool(save or save_due)

    def expect_save(self, seconds: float) -> None:
        self.expected_save = seconds

    def record_save(self, seconds: float, complete: bool = True) -> None:
        self.longest_save = max(self.longest_save, seconds)
        if complete:
            self.expected_save = 0.0

    def _check_clock(self) -> tuple[bool, bool]:
        """Return (whether --max_minutes ends before another step and save could, whether a save is due).

        Also measures the step. On ranks other than 0 both are False.
        """
        now = time.time()
        self.longest_step, self.last_step = max(self.longest_step, now - self.last_step), now
        if self.rank != 0:
            return False, False
        # Two steps: the GPU may still have to compute most of the current one.
        needed = 2 * self.longest_step + max(self.longest_save, self.expected_save)
        return now + needed > self.deadline, 0 < self.save_seconds <= now - self.last_save


@contextlib.contextmanager
def signals_blocked_for_children() -> Iterator[None]:
    """Block STOPS and SAVE in the processes started within, until they call `unblock_signals`.

    These signals may go to a whole process group, but helper processes have to live until the current step is
    finished. Afterwards this process receives signals as before, also those that came meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (SAVE,))  # a child inherits its parent's mask
    try:
        # multiprocessing would start the tracker with its first child, and unblock STOPS after that.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_signals() -> None:
    """Receive STOPS and SAVE from here on, also those that came while they were blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOPS, SAVE))


def _exit_now(number: signal.Signals) -> None:
    sys.stdout.flush()
    os._exit(128 + number)


@contextlib.contextmanager
def forwarding_signals(start: Callable[[], list]) -> Iterator[tuple[ReceivedSignals, list]]:
    """Call start(), then forward STOPS and SAVE to the ranks that it started; yield (signals, ranks).

    start() returns the ranks' processes. A second stop kills them. Signals are blocked in the ranks until
    they call `unblock_signals`; stops that come before start() returns are forwarded after it.
    """
    ranks: list = []
    second_stops: list[int] = []

    def send(number: int) -> None:
        """Send a signal to all ranks that are alive."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)

    def kill(number: int) -> None:
        second_stops.append(number)
        send(signal.SIGKILL)

    received = ReceivedSignals(on_second_stop=kill)

    def handle(number: int, _frame) -> None:
        received.handle(number)
        send(number)

    before = {number: signal.signal(number, handle) for number in (*STOPS, SAVE)}
    try:
        with signals_blocked_for_children():
            ranks += start()
            if received.stop:  # another thread of this process received it before there were ranks
                send(signal.SIGKILL if second_stops else received.stop)
        yield received, ranks
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
