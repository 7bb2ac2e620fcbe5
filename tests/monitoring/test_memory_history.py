"""--profile_memory's curves and page, from recordings whose numbers are known."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch

from monitoring import memory_history
from monitoring.memory_history import (
    BETWEEN_STEPS,
    BUCKETS,
    MemoryHistory,
    PhaseStart,
    RecordedStep,
    Recording,
    curve_from_events,
    curves_from_snapshot,
)
from monitoring.memory_page import render_memory_page, write_pages
from tests.helpers.report_pages import CHROMIUM, HOSTILE, Page, screenshot

GIB = 2**30
Phase = memory_history.RecordedPhase


def event(seconds: float, action: str, size: int, **more) -> dict:
    """Return an event as torch 2.11 to 2.13 record it; that of an out-of-memory error has no address."""
    return {"action": action, "addr": 0, "size": size, "stream": 0, "time_us": round(seconds * 1e6), **more}


def block(size: int, requested: int, state: str) -> dict:
    return {"address": 0, "size": size, "requested_size": requested, "state": state, "frames": []}


@pytest.fixture
def snapshot() -> dict:
    """Return a snapshot of two GPUs; the numbers of device 0 would change every value of device 1.

    Device 1: 100 bytes exist since before the record, 300 are allocated and freed, 50 stay; a segment of
    4,096 bytes is added to the first one of 2,048.
    """
    trace = [
        event(11.0, "segment_map", 4096),
        event(11.0, "alloc", 300),
        event(12.0, "free_requested", 300),
        event(12.5, "free_completed", 300),
        event(13.0, "oom", 10**9, device_free=7),
        event(14.0, "alloc", 50),
        event(14.5, "alloc", 1000),
        event(15.0, "free_requested", 1000),  # another stream still uses its block
        event(16.0, "snapshot", 0),
    ]
    blocks = [block(512, 100, "active_allocated"), block(512, 50, "active_allocated")]
    blocks += [block(1024, 1000, "active_awaiting_free"), block(4096, 0, "inactive")]
    recorded = {"device": 1, "total_size": 6144, "allocated_size": 1024, "blocks": blocks}
    other = {"device": 0, "total_size": 10**6, "blocks": [block(10**6, 10**6, "active_allocated")]}
    return {"segments": [other, recorded], "device_traces": [[event(1.0, "alloc", 10**6)], trace]}


def test_curves_are_computed_from_torchs_snapshot(snapshot):
    assert curves_from_snapshot(snapshot, 1, start_time=10.0) == {
        "allocated": [(10.0, 100), (11.0, 400), (12.0, 100), (14.0, 150), (14.5, 1150), (15.0, 150)],
        "reserved": [(10.0, 2048), (11.0, 6144)],
    }


def test_events_that_torch_dropped_are_not_made_up(snapshot, monkeypatch):
    """The curve of a full record begins with its first event, not with the run."""
    monkeypatch.setattr(memory_history, "MAX_EVENTS", 9)
    curve = curves_from_snapshot(snapshot, 1, start_time=10.0)["allocated"]
    assert curve[0] == (11.0, 100) and curve[1:] == [(11.0, 400), *curve[2:]]
    assert curve_from_events([], 70, memory_history.TENSOR_EVENTS, 3.0) == [(3.0, 70)]


def test_a_curve_has_the_corners_of_its_steps():
    points = [(10.0, 1.0), (11.0, 4.0), (12.0, 2.0)]
    assert memory_history.clip_curve(points, 10.5, 13.0) == [
        (0.0, 1.0), (0.5, 1.0), (0.5, 4.0), (1.5, 4.0), (1.5, 2.0), (2.5, 2.0)]  # fmt: skip
    assert memory_history.clip_curve(points, 11.0, 11.5) == [(0.0, 4.0), (0.5, 4.0)]
    assert memory_history.clip_curve(points, 9.0, 10.5) == [(1.0, 1.0), (1.5, 1.0)]
    assert memory_history.clip_curve(points, 8.0, 9.0) == []


def test_a_thinned_curve_keeps_peaks_and_order():
    line = [(i / 1000, float(i % 7)) for i in range(5000)]
    line[3210] = (3.21, 99.0)
    thinned = memory_history.thin_out(line)
    assert len(thinned) <= 4 * BUCKETS + 2 and (3.21, 99.0) in thinned
    assert [thinned[0], thinned[-1]] == [line[0], line[-1]]
    indices = [line.index(p) for p in thinned]
    assert indices == sorted(indices)
    assert memory_history.thin_out(line[:100]) == line[:100]


def phase_starts(*rows) -> list[PhaseStart]:
    return list(itertools.starmap(PhaseStart, rows))


def test_steps_have_the_phases_and_their_peaks():
    """Two micro-batches; the highest memory is between the steps, so it is in no step."""
    starts = phase_starts(
        (0, 0, "wrap"), (1, 0, "load"), (3, 0, BETWEEN_STEPS),
        (10, 1, "forward"), (11, 1, "backward"), (13, 1, "forward"), (14, 1, "backward"),
        (16, 1, "optimizer"), (17, 1, BETWEEN_STEPS), (30, 2, "forward"),
    )  # fmt: skip
    levels = [
        (0, 0.0),
        (2, 3.0),
        (2.5, 2.0),
        (5, 50.0),
        (9, 2.0),
        (10.5, 5.0),
        (12, 9.0),
        (12.5, 4.0),
        (30, 1.0),
    ]
    curves = {"allocated": [(t, g * GIB) for t, g in levels], "reserved": [(0, 64 * GIB)]}
    start, first, second = memory_history.split_into_steps(starts, curves, end=31)
    assert (start.name, start.seconds, first.name, first.seconds) == ("start", 3, "step 1", 7)
    assert start.spans == [Phase("wrap", 0, 1, 0.0, 0.0), Phase("load", 1, 3, 3.0, 2.0)]
    assert first.spans[:3] == [Phase("forward", 0, 1, 5.0, 5.0), Phase("backward", 1, 3, 9.0, 4.0),
                               Phase("forward", 3, 4, 4.0, 4.0)]  # fmt: skip
    assert first.peak == first.spans[1] and [s.name for s in first.spans[3:]] == ["backward", "optimizer"]
    assert first.curves["reserved"] == [(0.0, 64.0), (7, 64.0)]
    assert max(v for _, v in first.curves["allocated"]) == 9.0
    assert second.spans == [Phase("forward", 0, 1, 1.0, 1.0)]


def test_a_phase_of_unknown_memory_is_left_out():
    known = {"allocated": [(11.5, GIB)]}
    starts = phase_starts((0, 0, "load"), (10, 1, "forward"), (11, 1, "backward"), (12, 1, "optimizer"))
    (step,) = memory_history.split_into_steps(starts, known, end=13)
    assert [s.name for s in step.spans] == ["backward", "optimizer"] and step.step == 1
    assert step.curves["allocated"] == [(1.5, 1.0), (3, 1.0)]


def test_resident_memory_is_sampled_on_a_cpu(tmp_path):
    history = MemoryHistory(torch.device("cpu"))
    history.start_phase("load", 0)
    tensor = torch.ones(200 * 2**20, dtype=torch.uint8)
    time.sleep(0.1)
    history.start_phase("forward", 1)
    del tensor
    time.sleep(0.1)
    recording = history.stop(3, tmp_path / "none.pickle")
    assert recording.rank == 3 and "CPU" in recording.device and not list(tmp_path.iterdir())
    load, forward = (part.spans[0] for part in recording.parts)
    curve = recording.parts[0].curves["resident"]
    assert load.last - curve[0][1] == pytest.approx(200 / 1024, abs=0.02) == load.peak - forward.last
    assert len(curve) > 6


def recordings() -> list[Recording]:
    """Two ranks of a start and two steps; rank 1 has the peak, 6.5 GiB, in the second step's backward."""
    start_curves = {"allocated": [(0, 0.0), (80, 4.0)], "reserved": [(0, 0.0), (80, 4.5)]}
    start = RecordedStep(
        0, 80.0, [Phase("wrap", 0, 0.5, 0.0, 0.0), Phase("load", 0.5, 80, 4.0, 4.0)], start_curves
    )

    def recorded_step(step: int, peak: float) -> RecordedStep:
        spans = [Phase("forward", 0, 0.3, 5.0, 5.0), Phase("backward", 0.3, 0.8, peak, 4.25),
                 Phase("optimizer", 0.8, 0.9, 4.25, 4.25)]  # fmt: skip
        allocated = [(0, 4.0), (0.3, 5.0), (0.55, peak), (0.8, 4.25), (0.9, 4.25)]
        return RecordedStep(step, 0.9, spans, {"allocated": allocated, "reserved": [(0, 8.0), (0.9, 8.0)]})

    return [
        Recording(
            rank, "NVIDIA H200, 139.8 GiB", [start, *(recorded_step(i, 6 + rank * i / 4) for i in (1, 2))]
        )
        for rank in (0, 1)
    ]


def test_the_page_shows_the_recordings():
    shown = Page(render_memory_page(recordings(), "some-model · qlora"))
    for expected in ("2 × NVIDIA H200, 139.8 GiB", "Peak 6.5 GiB in the backward of step 2, rank 1",
                     "After load 4 GiB start, rank 1", "After backward 4.25 GiB step 2, rank 1",
                     "Rank 0", "Rank 1", "step 2 backward 500 ms 6.5 4.25",
                     "start load 79.5 s 4 4"):  # fmt: skip
        assert expected in shown.text, expected
    assert [c["group"] for c in shown.charts] == ["start", "step 1", "step 2"] * 2
    assert {c["label"] for c in shown.charts} == {"{} s"}
    assert [c["to"] for c in shown.charts[:2]] == [80, 0.9]
    # All charts have one scale: 8 GiB are at one height, and 4 half way down.
    heights = {s["name"]: s["points"] for s in shown.charts[1]["series"]}
    (bottom,) = {int(a["data-height"]) for tag, a in shown.tags if tag == "figure"}
    assert heights["reserved"][0][2] < heights["allocated"][0][2] < bottom
    assert shown.charts[0]["series"][0]["points"][1][2] == heights["allocated"][0][2]
    bands = [a for tag, a in shown.tags if tag == "rect" and "x" in a]
    backward = next(a for a in bands if a["class"] == "band backward")
    assert len(bands) == 2 * (2 + 3 + 3)
    assert (float(backward["x"]), float(backward["width"])) == pytest.approx((333.3, 555.6), abs=0.1)


def test_hostile_names_stay_text():
    shown = Page(render_memory_page([Recording(0, HOSTILE, recordings()[0].parts)], HOSTILE))
    assert "img" not in {tag for tag, _ in shown.tags} and shown.text.count(HOSTILE) >= 2
    assert not [
        name for _, a in shown.tags for name in a if name.startswith("on") or name in ("style", "src")
    ]


def test_the_picture(tmp_path):
    """The picture has a background in each phase's colour, and the curves in theirs."""
    from matplotlib.image import imread

    write_pages(tmp_path / "memory", recordings(), "a title")
    levels = (imread(tmp_path / "memory.png")[..., :3] * 255).round().astype(int)
    for colour in ("#ececf1", "#dcebfb", "#fde9d4", "#dcf2e0", "#2563c4", "#c4560a"):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (levels == wanted).all(-1).sum() > 100, colour
    assert {p.name for p in tmp_path.iterdir()} == {"memory.html", "memory.png"}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_the_page_light_and_dark(tmp_path):
    from matplotlib.image import imread

    write_pages(tmp_path / "memory", recordings(), "a title")
    colours = ((1, (0xFD, 0xE9, 0xD4), (0x25, 0x63, 0xC4)), (0, (0x3A, 0x2A, 0x1B), (0x6E, 0xA8, 0xFF)))
    for scheme, backward, curve in colours:
        picture, document = screenshot(Path(tmp_path / "memory.html"), tmp_path, scheme)
        assert document.count('class="cross"') == 6  # the script ran: one for each chart
        levels = (imread(picture)[..., :3] * 255).round().astype(int)
        for colour, least in ((backward, 10_000), (curve, 500)):
            assert (abs(levels - list(colour)).max(axis=-1) <= 3).sum() > least
