"""A thread beside the one that trains rests, and is not held up when somebody waits for it."""

from __future__ import annotations

import sys
import time
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp

import background
import checkpoint_files
from background import Background, at_once
from checkpoint_files import Writer, folder_of


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


def test_what_needs_no_python_is_done_at_once():
    behind = Background(rests=True)
    with behind.turns():
        with at_once():
            work(0.1)
        assert behind.rested < 0.2, "once, afterwards"
        with pytest.raises(ValueError), at_once():
            raise ValueError
        work(0.1)
    assert behind.rested > 0.3
    assert sys.getprofile() is None


def test_at_once_leaves_alone_what_watches():
    def watch(*_) -> None: ...

    sys.setprofile(watch)
    try:
        with at_once():
            assert sys.getprofile() is watch
        assert sys.getprofile() is watch
    finally:
        sys.setprofile(None)


def test_a_checkpoints_files_are_written_at_once(tmp_path, monkeypatch):
    """The largest part of a checkpoint: by the clock it would rest for six times as long."""
    watched = []
    for name in ("write_tensors", "sync", "_measure"):
        original = getattr(checkpoint_files, name)
        monkeypatch.setattr(checkpoint_files, name, partial(seen, watched, original))
    state = {"weight": torch.ones(3)}
    writer = Writer(folder_of(tmp_path, 1), 1, lambda: {"parts": {}, "files": {}})
    with Background(rests=True).turns():
        dcp.save(state, storage_writer=writer, no_dist=True)
    assert watched[:3] == [("write_tensors", None), ("sync", None), ("_measure", None)]


def seen(watched: list, original, *args):
    watched.append((original.__name__, sys.getprofile()))
    return original(*args)
