"""Requests that come from outside the training: signals, and limits of time.

SIGTERM, SIGINT   once: the step is finished, a checkpoint written, and the run ends with status 0; a second time, a
                  second or more later: the run ends at once
SIGUSR1           a checkpoint, and training goes on

Whoever starts the ranks may send each of them the signal that the whole group got already - a terminal's Ctrl-C goes
to all processes, and so do Slurm's signals - so two within a second count as one. A SIGUSR1 may also reach one rank
before a step's end and another after it: what comes within a second of the checkpoint that it asked for is the same.
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

STOPS = (signal.SIGTERM, signal.SIGINT)
SAVE = signal.SIGUSR1
APART_SECONDS = 1.0


class Received:
    """The signals that this process got. stop: the first of STOPS, or None; save: whether SAVE came since the last
    answer to it; again(signal): called by the second stop."""

    def __init__(self, again):
        self.stop: signal.Signals | None = None
        self.save, self.again, self._first = False, again, 0.0
        self._answered = float("-inf")

    def note(self, number: int, _frame=None) -> None:
        """The handler."""
        if number == SAVE:
            self.save = time.monotonic() - self._answered >= APART_SECONDS
        elif self.stop is None:
            self.stop, self._first = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._first >= APART_SECONDS:
            self.again(signal.Signals(number))

    def answered(self) -> None:
        """SAVE is answered, as any rank heard it: this one may hear it later."""
        self._answered = time.monotonic()
        self.save = False


class NeverStop:
    """Nothing is asked for. reason: why the run is to stop, or ""."""

    reason = ""

    def agree(self, last: bool) -> tuple[bool, bool]:
        """(whether the run is to stop after this step, whether a checkpoint is wanted)."""
        return False, False

    def expect_save(self, seconds: float) -> None:
        """How long a checkpoint may take, as long as none has been written."""

    def saved_in(self, seconds: float, whole: bool = True) -> None:
        """How long the last checkpoint took, or, not whole, the one that is being written has taken."""


NEVER = NeverStop()


class Stopping(NeverStop):
    """Listens to signals and looks at the clock. Every rank has one: they may get different signals at different
    moments, and must stop after the same step.

    started: time.time() of the run's start; max_minutes, save_minutes: as the options, 0 = none. Both are rank 0's
    clock.
    """

    def __init__(self, rank: int, started: float, max_minutes: float, save_minutes: float):
        self.rank, self.save_seconds = rank, save_minutes * 60
        self.ends = started + max_minutes * 60 if max_minutes else float("inf")
        self.last_save = self.last_step = time.time()
        self.longest_step = self.longest_save = self.expected_save = 0.0
        self.received = Received(again=_end_now)
        for number in (*STOPS, SAVE):
            signal.signal(number, self.received.note)

    def agree(self, last: bool) -> tuple[bool, bool]:
        """Collective: what any rank was asked for, or the clock of rank 0 says. A run that ends by itself does not
        stop."""
        asked = torch.tensor([self.received.stop or 0, self.received.save, *self._clock()], dtype=torch.int64)
        if dist.get_world_size() > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        stop, save, late, due = asked.tolist()
        if save:
            self.received.answered()
        if due:
            self.last_save = time.time()
        if last:
            return False, bool(save or due)
        self.reason = signal.Signals(stop).name if stop else "--max_minutes" if late else ""
        return bool(self.reason), bool(save or due)

    def expect_save(self, seconds: float) -> None:
        self.expected_save = seconds

    def saved_in(self, seconds: float, whole: bool = True) -> None:
        self.longest_save = max(self.longest_save, seconds)
        if whole:
            self.expected_save = 0.0

    def _clock(self) -> tuple[bool, bool]:
        """(whether another step and its checkpoint would pass --max_minutes, whether --save_minutes are over)."""
        now = time.time()
        self.longest_step, self.last_step = max(self.longest_step, now - self.last_step), now
        if self.rank != 0:
            return False, False
        # The GPU may have most of this step still before it.
        needed = 2 * self.longest_step + max(self.longest_save, self.expected_save)
        return now + needed > self.ends, 0 < self.save_seconds <= now - self.last_save


@contextlib.contextmanager
def signals_blocked_for_children() -> Iterator[None]:
    """Processes that are started within hear nothing of STOPS and SAVE, which may go to a whole process group: helpers
    that a step needs have to live until it is finished. Or nothing until they `hear`. This process hears them again
    afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (SAVE,))  # children begin with their parent's
    try:
        resource_tracker.ensure_running()  # multiprocessing would with its first child, and unblock STOPS after that
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_signals() -> None:
    """In a process that was started unheard: STOPS and SAVE, also those that came since."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOPS, SAVE))


def _end_now(number: signal.Signals) -> None:
    sys.stdout.flush()
    os._exit(128 + number)


@contextlib.contextmanager
def forwarding_signals(start: Callable[[], list]) -> Iterator[tuple[Received, list]]:
    """In the parent of the ranks, the processes that `start` starts: sends them what it receives, and kills them at the
    second stop. They are started unheard; stops that come meanwhile are answered once they are there."""
    ranks: list = []
    again: list[int] = []

    def send(number: int) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)

    def end(number: int) -> None:
        again.append(number)
        send(signal.SIGKILL)

    received = Received(again=end)

    def handle(number: int, frame) -> None:
        received.note(number)
        send(number)

    before = {number: signal.signal(number, handle) for number in (*STOPS, SAVE)}
    try:
        with signals_blocked_for_children():
            ranks += start()
            if received.stop:  # heard by another thread of this process, when there was no rank
                send(signal.SIGKILL if again else received.stop)
        yield received, ranks
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
