"""A thread beside the one that trains rests, and is not held up when somebody waits for it."""

from __future__ import annotations

import gc
import sys
import time
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpoints import background
from checkpoints.background import Background, Resting
from checkpoints.planner import CopyPlanner
from checkpoints.storage import Writer, folder_of


def work(behind: Background, seconds: float) -> float:
    """Computes in Python for so long by the thread's own clock. Returns how long that took."""
    began, ends = time.perf_counter(), time.thread_time() + seconds
    while time.thread_time() < ends:
        behind.rest()
    return time.perf_counter() - began


def test_it_rests_most_of_the_time():
    behind = Background(rests=True)
    took = work(behind, 0.1)
    assert behind.rested > 0.3 and took > 0.4, "50 turns of 2 ms, and 10 ms after each"


def test_it_rests_only_where_it_is_to():
    behind = Background(rests=False)
    work(behind, 0.02)
    assert behind.rested == 0


def test_it_does_not_rest_while_somebody_waits(monkeypatch):
    monkeypatch.setattr(background, "REST", 60.0)
    behind = Background(rests=True)
    behind.hurry.set()
    assert work(behind, 0.1) < 30
    assert behind.rested < 30


def test_the_collector_passes_over_what_is_there():
    before = gc.get_freeze_count()
    Background(rests=False).prepare()
    assert gc.get_freeze_count() == before
    behind = Background(rests=True)
    behind.prepare()
    frozen, rest = gc.get_freeze_count(), gc.get_objects(generation=2)
    behind.finish()
    after = gc.get_freeze_count()
    gc.freeze()  # as conftest.py had it
    assert frozen > before and not rest and after == 0


def test_items_come_with_rests_between_them():
    behind, items = Background(rests=True), {"a": 1, "b": 2, "c": 3}
    with mock.patch.object(behind, "rest") as rest:
        resting = Resting(items, behind)
        assert resting == items and list(resting.items()) == list(items.items()) and len(resting.items()) == 3
    assert rest.call_count == 3


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_rests_at_each_tensor_and_is_watched_by_nothing(tmp_path):
    """In torch's loop, and in ours; fewer times where the plan is there. A profiler would slow the thread that trains as
    well, from Python 3.12 on."""
    state = {f"weight.{i}": torch.full((3,), float(i)) for i in range(5)}
    behind, watching = Background(rests=True), []
    planner = CopyPlanner(behind)
    with mock.patch.object(behind, "rest", side_effect=lambda: watching.append(sys.getprofile())):
        for step, rests in ((1, 25), (2, 5)):
            writer = Writer(folder_of(tmp_path, step), step, lambda: {"parts": {}, "files": {}})
            planner.hold(state, state)
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
            assert watching == [sys.getprofile()] * rests
            watching.clear()
