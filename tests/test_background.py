"""A thread beside the one that trains rests, and is not held up when somebody waits for it."""

from __future__ import annotations

import sys
import time

import pytest

import background
from background import Background


def work(seconds: float) -> float:
    """Computes in Python for so long by the thread's own clock. Returns how long that took."""
    began, ends = time.perf_counter(), time.thread_time() + seconds
    while time.thread_time() < ends:
        abs(-1)
    return time.perf_counter() - began


def test_it_rests_most_of_the_time():
    behind = Background(rests=True)
    with behind.turns():
        took = work(0.1)
    assert behind.rested > 0.3 and took > 0.4, "50 turns of 2 ms, and 10 ms after each"
    assert sys.getprofile() is None


def test_it_does_not_rest_while_somebody_waits(monkeypatch):
    monkeypatch.setattr(background, "REST", 60.0)
    behind = Background(rests=True)
    behind.hurry.set()
    with behind.turns():
        assert work(0.1) < 30
    assert behind.rested < 30


def test_it_is_left_alone_by_what_watches_it():
    """And is watched no more after an error."""
    behind = Background(rests=True)

    def watch(*_) -> None: ...

    sys.setprofile(watch)
    try:
        with behind.turns():
            assert sys.getprofile() is watch
            work(0.02)
    finally:
        sys.setprofile(None)
    assert behind.rested == 0
    with pytest.raises(ValueError), behind.turns():
        raise ValueError
    assert sys.getprofile() is None
