"""Memory over time: the start of a run and its first steps (--profile_memory), or the recorded steps of a cycle of
--profile (--export_memory_timeline).

On a GPU torch's allocator records its events, and the curve is counted out of them: no peak between two samples
is missed. On a CPU a thread samples the process's resident size. Marks tell when a phase began (wrap, load, forward,
backward, optimizer). All times are the system's clock in seconds: torch's `time_us` is that clock in microseconds,
and the allocator's events happen where the host allocates, so they lie in the phase that asked for the memory,
however far behind the GPU is.
"""

from __future__ import annotations

import pickle
import threading
import time
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import torch

from files.atomic_writes import stage_files
from launch.memory import GIB, bytes_in_use

MOST_EVENTS = (
    200_000  # of the allocator, the newest: an 8B model's start and three steps make about half of them
)
SAMPLE_SECONDS = 0.01
BETWEEN = "between steps"  # not a phase: data, logging, evaluation
BUCKETS = 120  # a curve of at most 4 * BUCKETS + 2 points

# What torch calls an event of its allocator -> what it does to the bytes of tensors, and to those that torch holds
# (`segment_map`: with expandable segments). A free counts when asked for, as in torch.cuda.memory_allocated().
OF_TENSORS = {"alloc": 1, "free_requested": -1}
OF_SEGMENTS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A phase began. seconds: the system's clock; step: of the run, from 1; 0 before the first."""

    seconds: float
    step: int
    name: str


@dataclass(frozen=True)
class Span:
    """A phase. start, end: seconds from the beginning of its part; peak, last: GiB, the highest in it and at its
    end."""

    name: str
    start: float
    end: float
    peak: float
    last: float


@dataclass(frozen=True)
class Part:
    """The start of a run (step 0) or a step. curves: by name, (seconds from its beginning, GiB); the first is the
    memory in use."""

    step: int
    seconds: float
    spans: list[Span]
    curves: dict[str, Points]

    @property
    def name(self) -> str:
        return f"step {self.step}" if self.step else "start"

    @property
    def peak(self) -> Span:
        return max(self.spans, key=lambda s: s.peak)


@dataclass(frozen=True)
class Recording:
    """Of one rank. device: its name; parts: at least one, unless nothing was recorded."""

    rank: int
    device: str
    parts: list[Part]


def count_back(events: list[dict], end: int, signs: dict[str, int], began: float) -> Points:
    """(seconds, bytes) from each event on, counted back from what there was at the end: what existed before the
    first event, or was forgotten with older ones, is in all of them. Before the first event it is known from
    `began` on if none was forgotten."""
    points: Points = []
    value = end
    for event in reversed(events):
        if sign := signs.get(event["action"]):
            points.append((event["time_us"] / 1e6, value))
            value -= sign * event["size"]
    forgotten = len(events) >= MOST_EVENTS
    points.append((events[0]["time_us"] / 1e6 if forgotten else began, value))
    return points[::-1]


def curves_of(snapshot: dict, device: int, began: float) -> dict[str, Points]:
    """Those of one GPU out of torch.cuda.memory._snapshot(): "allocated" counts the bytes that were asked for, which
    torch rounds up to 512 each in memory_allocated(); "reserved", what torch took from the GPU."""
    segments = [s for s in snapshot["segments"] if s["device"] == device]
    tensors = sum(
        b["requested_size"] for s in segments for b in s["blocks"] if b["state"] == "active_allocated"
    )
    events = snapshot["device_traces"][device]
    return {
        "allocated": count_back(events, tensors, OF_TENSORS, began),
        "reserved": count_back(events, sum(s["total_size"] for s in segments), OF_SEGMENTS, began),
    }


def stretch(points: Points, start: float, end: float) -> Points:
    """A step function between two times as a line: (seconds from start, value), with both corners of each step.
    Empty if it is not known by then."""
    first = bisect_right(points, start, key=lambda p: p[0]) - 1
    last = bisect_right(points, end, key=lambda p: p[0])
    line = [(0.0, points[first][1])] if first >= 0 else []
    for at, value in points[first + 1 : last]:
        if line:
            line.append((at - start, line[-1][1]))
        line.append((at - start, value))
    return [*line, (end - start, line[-1][1])] if line else []


def thin(line: Points) -> Points:
    """Of each of BUCKETS spans of time the first, the lowest, the highest and the last point, in their order."""
    if len(line) <= 4 * BUCKETS:
        return line
    kept = {0, len(line) - 1}
    buckets: dict[int, list[int]] = {}
    for i, (at, _) in enumerate(line):
        buckets.setdefault(min(int(at / line[-1][0] * BUCKETS), BUCKETS - 1), []).append(i)
    for bucket in buckets.values():
        by_value = sorted(bucket, key=lambda i: line[i][1])
        kept |= {bucket[0], by_value[0], by_value[-1], bucket[-1]}
    return [line[i] for i in sorted(kept)]


def parts_of(marks: list[Mark], curves: dict[str, Points], end: float) -> list[Part]:
    """Of the marks, in their order, and the curves in bytes. A part ends with its last phase; one of which nothing
    is known is left out."""
    curves = {name: [(t, b / GIB) for t, b in points] for name, points in curves.items()}
    used, parts = next(iter(curves.values())), []
    ends = [m.seconds for m in marks[1:]] + [end]
    phases = [(m, e) for m, e in zip(marks, ends, strict=True) if m.name != BETWEEN and e > m.seconds]
    for step in dict.fromkeys(m.step for m, _ in phases):
        mine = [(m, e) for m, e in phases if m.step == step]
        start, stop = mine[0][0].seconds, mine[-1][1]
        spans = []
        for mark, until in mine:
            if line := stretch(used, mark.seconds, until):
                peak = max(value for _, value in line)
                spans.append(Span(mark.name, mark.seconds - start, until - start, peak, line[-1][1]))
        if spans:
            lines = {name: thin(stretch(points, start, stop)) for name, points in curves.items()}
            parts.append(Part(step, stop - start, spans, {n: line for n, line in lines.items() if line}))
    return parts


class History:
    """Of one rank, from now on, until `stop`; one at a time in a process."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Mark] = []
        self.source = (GpuEvents if device.type == "cuda" else HostSamples)(device)

    def phase(self, name: str, step: int) -> None:
        self.marks.append(Mark(time.time(), step, name))

    def stop(self, rank: int, snapshot: Path) -> Recording:
        """snapshot: the file for torch's snapshot, which there is of a GPU only."""
        end = time.time()
        curves = self.source.stop(snapshot)
        return Recording(rank, _name(self.device), parts_of(self.marks, curves, end))


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return "process on the CPU"
    gib = torch.cuda.get_device_properties(device).total_memory / GIB
    return f"{torch.cuda.get_device_name(device)}, {gib:.1f} GiB"


class GpuEvents:
    """torch's own record of a GPU's allocations."""

    def __init__(self, device: torch.device):
        self.device, self.began = device, time.time()
        # Stacks of Python only, and only of allocations: looking up C++ ones takes minutes.
        torch.cuda.memory._record_memory_history(
            context="alloc", stacks="python", max_entries=MOST_EVENTS, clear_history=True
        )

    def stop(self, path: Path) -> dict[str, Points]:
        """The curves in bytes. Leaves the snapshot, in the format of https://pytorch.org/memory_viz."""
        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        with stage_files(path.parent) as stage, stage(path.name).open("wb") as file:
            pickle.dump(snapshot, file)  # as torch.cuda.memory._dump_snapshot, which would take another one
        return curves_of(snapshot, self.device.index, self.began)


class HostSamples:
    """Samples of this process's resident size."""

    def __init__(self, device: torch.device):
        self.device, self.ended = device, threading.Event()
        self.points: Points = []
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while True:
            self.points.append((time.time(), bytes_in_use(self.device)))
            if self.ended.wait(SAMPLE_SECONDS):
                return

    def stop(self, _: Path) -> dict[str, Points]:
        """The curve in bytes."""
        self.ended.set()
        self.thread.join()
        return {"resident": self.points}
