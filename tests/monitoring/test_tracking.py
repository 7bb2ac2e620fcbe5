"""A step's metrics are read without waiting, its time has the right ends; a full disk loses whole lines."""

from __future__ import annotations

import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from files.disk_room import append_lines
from monitoring.metrics import Meter
from tests.helpers.resuming import fill


class Copies(TorchDispatchMode):
    """Records whether tensors were copied from one device to another."""

    seen = False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.seen |= op is torch.ops.aten._to_copy.default and result.device != args[0].device
        return result


def test_a_reading_waits_for_nothing():
    """Numbers of the host reach a GPU, here a fake, without a copy. The rest: tests/gpu/test_modes.py."""
    with FakeTensorMode(), Copies() as copies:
        meter = Meter(torch.device("cpu"), {"forward": 5, "backward": 6})
        meter.device = torch.device("cuda", 0)
        columns = meter._memory()
    assert [t.device.type for t in columns] == ["cuda"] * 4 and not copies.seen


def test_a_lap_is_the_time_between_the_ends_of_steps(monkeypatch):
    """It includes the optimizer's step, and excludes what comes before `restart`."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter, laps = Meter(torch.device("cpu"), {}), []
    for work, evaluation in ((1, 5), (10, 0), (20, 0)):
        now[0] += work
        laps.append(meter.lap())
        now[0] += evaluation
        if evaluation:
            meter.restart()
    now[0] += 1000
    assert [lap.seconds() for lap in laps] == [1, 10, 20]


def test_lines_that_a_full_disk_does_not_take_are_lost_as_a_whole(small_disk):
    printed = []
    fill(small_disk, leave=4096)
    append_lines(small_disk / "lines", "first\n", printed.append)
    append_lines(small_disk / "lines", "second" * 1000 + "\n", printed.append)
    append_lines(small_disk / "lines", "third\n", printed.append)
    assert (small_disk / "lines").read_text() == "first\nthird\n"
    problem = "No space left on device; lines of it are lost, and training goes on"
    assert [text.partition("(")[0] for text in printed] == [f"WARNING: {small_disk / 'lines'}: {problem}"]
