"""The background thread pauses next to the training thread, but not while another thread waits for it."""

from __future__ import annotations

import gc
import sys
import time
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpoints import background
from checkpoints.background import BackgroundThrottle, ThrottledDict
from checkpoints.planner import CheckpointPlanner
from checkpoints.storage import CheckpointWriter, checkpoint_folder


def work(throttle: BackgroundThrottle, seconds: float) -> float:
    """Compute in Python for `seconds` of the thread's CPU time. Return the elapsed seconds."""
    began, ends = time.perf_counter(), time.thread_time() + seconds
    while time.thread_time() < ends:
        throttle.pause_if_due()
    return time.perf_counter() - began


def test_it_pauses_most_of_the_time():
    throttle = BackgroundThrottle(enabled=True)
    took = work(throttle, 0.1)
    assert throttle.paused_seconds > 0.3 and took > 0.4, "50 turns of 2 ms, and 10 ms after each"


def test_it_pauses_only_if_enabled():
    throttle = BackgroundThrottle(enabled=False)
    work(throttle, 0.02)
    assert throttle.paused_seconds == 0


def test_it_does_not_pause_while_another_thread_waits(monkeypatch):
    monkeypatch.setattr(background, "PAUSE_SECONDS", 60.0)
    throttle = BackgroundThrottle(enabled=True)
    throttle.hurry.set()
    assert work(throttle, 0.1) < 30
    assert throttle.paused_seconds < 30


def test_garbage_collection_skips_existing_objects():
    before = gc.get_freeze_count()
    BackgroundThrottle(enabled=False).freeze_gc()
    assert gc.get_freeze_count() == before
    throttle = BackgroundThrottle(enabled=True)
    throttle.freeze_gc()
    frozen, rest = gc.get_freeze_count(), gc.get_objects(generation=2)
    throttle.unfreeze_gc()
    after = gc.get_freeze_count()
    gc.freeze()  # as conftest.py had it
    assert frozen > before and not rest and after == 0


def test_a_throttled_dict_pauses_between_items():
    throttle, items = BackgroundThrottle(enabled=True), {"a": 1, "b": 2, "c": 3}
    with mock.patch.object(throttle, "pause_if_due") as pause:
        throttled = ThrottledDict(items, throttle)
        assert (
            throttled == items
            and list(throttled.items()) == list(items.items())
            and len(throttled.items()) == 3
        )
    assert pause.call_count == 3


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_save_pauses_at_each_tensor_without_a_profiler(tmp_path):
    """In torch's loop and in ours; less often once there is a plan.

    A profiler would slow down the training thread too, from Python 3.12 on.
    """
    state = {f"weight.{i}": torch.full((3,), float(i)) for i in range(5)}
    throttle, profilers = BackgroundThrottle(enabled=True), []
    planner = CheckpointPlanner(throttle)
    with mock.patch.object(throttle, "pause_if_due", side_effect=lambda: profilers.append(sys.getprofile())):
        for step, pauses in ((1, 25), (2, 5)):
            writer = CheckpointWriter(
                checkpoint_folder(tmp_path, step), step, lambda: {"parts": {}, "files": {}}
            )
            planner.set_tensors(state, state)
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
            assert profilers == [sys.getprofile()] * pauses
            profilers.clear()
