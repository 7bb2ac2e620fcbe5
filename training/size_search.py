"""Finds the largest size that fits on the GPUs, by few trials that an estimate of the memory proposes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from training.trial import TrialResult

MAX_TRIALS = 6  # each starts processes and compiles
CLOSE_ENOUGH = 0.01  # the search ends if at most this share could be gained


@dataclass
class SizeSearch:
    """The state of a search among sizes whose memory increases.

    The estimate is good to some percent, so that the first proposal is near the result. From the first trial
    that fits on, its measured peak corrects the estimate.

    Attributes:
        candidates: the sizes, ascending.
        estimate: estimate(size) returns the bytes of its peak.
        room: bytes that it may take; infinity = unknown. Each trial measures it.
        trials: (size, result) of each trial so far.
        untried: the largest size that may fit too, if the trials ended before the search; None = it ended.
    """

    candidates: Sequence[int]
    estimate: Callable[[int], float]
    room: float
    trials: list[tuple[int, TrialResult]] = field(default_factory=list)
    untried: int | None = None

    def run(
        self,
        attempt: Callable[[int], TrialResult],
        agree: Callable[[int | None], int | None] = lambda index: index,
    ) -> int | None:
        """Try sizes until the largest that fits is found, or MAX_TRIALS are used up; return it.

        Returns None if not even the smallest size fits.

        Args:
            attempt: attempt(size) tries a size; the result is the same on all ranks.
            agree: agree(index) returns one rank's index on all ranks, whose estimates may differ: nodes may
                have different GPUs.
        """
        low, high = -1, len(self.candidates)  # indices of the largest that fits, and of the smallest that not
        while high - low > 1 and len(self.trials) < MAX_TRIALS:
            index = agree(self._first_fits(high) if low < 0 else self._next(low, high))
            if index is None:
                break
            size = self.candidates[index]
            result = attempt(size)
            self.trials.append((size, result))
            self.room = result.room or self.room
            low, high = (index, high) if result.fits else (low, index)
        is_used_up = len(self.trials) == MAX_TRIALS and 0 <= low < high - 1
        if is_used_up and agree(self._next(low, high)) is not None:
            self.untried = self.candidates[high - 1]
        return self.candidates[low] if low >= 0 else None

    def _first_fits(self, high: int) -> int:
        """Return the index to try while no size has fitted. high: of the smallest that did not fit."""
        failures = len(self.trials)
        if failures == MAX_TRIALS - 1:
            return 0
        if failures and math.isinf(self.room):
            return high // 2
        share = 1.1 - 0.1 * 2**failures  # 1, 0.9, 0.7, 0.3: far below the room if the estimate is far off
        return max(self._count(self.room * share, high) - 1, 0)

    def _next(self, low: int, high: int) -> int | None:
        """Return the index to try between a size that fits and one that does not; None = none is worth it."""
        fits = self.candidates[low]
        room = self.room
        if not math.isinf(room):
            peak = next(result.peak for size, result in self.trials if size == fits)
            estimated = self.estimate(fits)
            # The error may be a constant or a factor: the more cautious of the two.
            room = min(room - (peak - estimated), room * estimated / peak)
        highest = self._count(room, high) - 1
        gain = self.candidates[max(highest, low)] - fits
        if gain <= CLOSE_ENOUGH * fits:
            return None
        # A size that should have fitted did not: the estimate says no more, so halve what is left.
        return highest if self.trials[-1][1].fits else (low + highest + 1) // 2

    def _count(self, room: float, high: int) -> int:
        """Return how many of the first `high` candidates take at most `room` by the estimate."""
        return bisect_right(self.candidates[:high], room, key=self.estimate)
