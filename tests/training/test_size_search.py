"""The search for the largest size that fits, on machines whose memory the estimate knows badly or well."""

from __future__ import annotations

import math

import pytest

from training.size_search import MAX_TRIALS, SizeSearch
from training.trial import TrialResult

FIXED, PER_ROW = 6e9, 0.7e9  # what the estimate says


def search(candidates, room: float, fixed: float, per_row: float, known: float | None = None):
    """Return (the size found, sizes tried), where a size really takes fixed + per_row x size bytes.

    known: the room that is known before the first trial; None = all of it.
    """
    search = SizeSearch(candidates, lambda n: FIXED + PER_ROW * n, room if known is None else known)

    def attempt(size: int) -> TrialResult:
        peak = fixed + per_row * size
        return TrialResult(peak <= room, peak=int(min(peak, room)), room=room)

    return search.run(attempt), [size for size, _ in search.trials]


@pytest.mark.parametrize("room", [7e9, 14e9, 24e9, 80e9, 139e9])
@pytest.mark.parametrize(
    ("error_fixed", "error_per_row"), [(0, 0), (0.05, 0.05), (-0.05, -0.05), (0.1, -0.05)]
)
def test_it_ends_within_one_of_the_largest_after_few_trials(room, error_fixed, error_per_row):
    fixed, per_row = FIXED * (1 + error_fixed), PER_ROW * (1 + error_per_row)
    largest = math.floor((room - fixed) / per_row)
    found, tried = search(range(1, 1001), room, fixed, per_row)
    assert found is None if largest < 1 else largest - max(1, largest // 100) <= found <= largest
    assert len(tried) <= 4 and len(tried) == len(set(tried))
    if not error_fixed and not error_per_row:
        assert tried == [largest]  # one trial, which fits


@pytest.mark.parametrize("known", [139e9, 12e9])
def test_the_first_trial_measures_the_room_of_a_gpu_that_others_use(known):
    """They may use more of it, or less, than was known before."""
    found, tried = search(range(1, 1001), 24e9, FIXED, PER_ROW, known)
    assert found in (24, 25) and len(tried) <= 3  # (24e9 - FIXED) / PER_ROW is 25.7


def test_it_finds_the_largest_candidate_even_if_the_estimate_is_far_off():
    """Candidates as divisors have; an estimate that is a third of the truth."""
    for largest in (1, 2, 3, 4, 6, 8, 12, 24):
        found, tried = search([1, 2, 3, 4, 6, 8, 12, 24], FIXED + 3 * PER_ROW * largest, FIXED, 3 * PER_ROW)
        assert found == largest and len(tried) <= MAX_TRIALS


def test_a_search_that_is_not_at_its_end_says_so():
    """Six trials are too few where nothing is estimated."""
    search = SizeSearch(range(1, 1001), lambda n: 0.0, math.inf)
    found = search.run(lambda n: TrialResult(n <= 101))
    tried = [size for size, _ in search.trials]
    assert len(tried) == MAX_TRIALS and found < 101 <= search.untried == min(n for n in tried if n > 101) - 1
    done = SizeSearch(range(1, 9), lambda n: 0.0, math.inf)
    assert done.run(lambda n: TrialResult(n <= 5)) == 5 and done.untried is None


def test_none_fits():
    found, tried = search(range(1, 1001), 5e9, FIXED, PER_ROW, known=139e9)
    assert found is None and len(tried) == len(set(tried)) <= MAX_TRIALS and tried[-1] == 1


def test_without_a_gpu_sizes_are_halved():
    """Nothing is estimated: the largest first."""
    search = SizeSearch(range(1, 9), lambda n: 0.0, math.inf)
    assert search.run(lambda n: TrialResult(n <= 5)) == 5
    assert [size for size, _ in search.trials] == [8, 4, 7, 5, 6]


def test_nodes_with_other_gpus_try_the_same_sizes():
    """Each rank has an estimate of its own; rank 0's proposals count on all."""
    proposed: list = []
    first = SizeSearch(range(1, 101), lambda n: FIXED + PER_ROW * n, 24e9)
    other = SizeSearch(range(1, 101), lambda n: 2 * FIXED + PER_ROW * n, 80e9)

    def attempt(size: int) -> TrialResult:
        return TrialResult(size <= 22, peak=int(FIXED + PER_ROW * size), room=24e9)

    assert first.run(attempt, agree=lambda index: proposed.append(index) or index) == 22
    assert other.run(attempt, agree=lambda index: proposed.pop(0)) == 22
    assert first.trials == other.trials and not proposed
