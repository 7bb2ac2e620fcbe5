"""Memory over time, by phase, for --profile_memory and --export_memory_timeline.

The first one covers a run's start and first steps, the second one the recorded steps of a cycle of --profile.

On a GPU, torch's allocator records its events, and the curve is computed from them: no peak between two
samples is missed. On a CPU, a thread samples the process's resident size. The loop marks the start of each
phase (wrap, load, forward, backward, optimizer).

All times are the system's clock in seconds; torch's `time_us` is the same clock in microseconds. The
allocator records an event when the host allocates, so it belongs to the phase that requested the memory,
however late the GPU is.
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

# torch keeps the newest ones. The start and three steps of an 8B model make about half as many.
MAX_EVENTS = 200_000
SAMPLE_SECONDS = 0.01
BETWEEN_STEPS = "between steps"  # not a phase: data, logging, evaluation
BUCKETS = 120  # a curve has at most 4 * BUCKETS + 2 points

# Name of an allocator event -> its sign in the bytes of tensors, and in the bytes that torch reserves on the
# GPU (`segment_map`: with expandable segments). A free counts when requested, as in
# torch.cuda.memory_allocated().
TENSOR_EVENTS = {"alloc": 1, "free_requested": -1}
SEGMENT_EVENTS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}

Points = list[tuple[float, float]]  # (seconds, value), in order


@dataclass(frozen=True)
class PhaseStart:
    """The start of a phase, or of the time between two steps.

    Attributes:
        seconds: the system's clock.
        step: the run's step, from 1; 0 before the first.
        name: the phase's name, or BETWEEN_STEPS.
    """

    seconds: float
    step: int
    name: str


@dataclass(frozen=True)
class RecordedPhase:
    """A phase. Saved as JSON by field name.

    Attributes:
        start, end: seconds since the start of its step.
        peak: its highest memory in GiB.
        last: the memory at its end in GiB.
    """

    name: str
    start: float
    end: float
    peak: float
    last: float


@dataclass(frozen=True)
class RecordedStep:
    """The start of a run (step 0) or an optimizer step. Saved as JSON by field name.

    Attributes:
        seconds: its duration.
        spans: its phases.
        curves: name -> (seconds since its start, GiB). The first curve is the memory in use.
    """

    step: int
    seconds: float
    spans: list[RecordedPhase]
    curves: dict[str, Points]

    @property
    def name(self) -> str:
        return f"step {self.step}" if self.step else "start"

    @property
    def peak(self) -> RecordedPhase:
        """The phase with the highest peak."""
        return max(self.spans, key=lambda s: s.peak)


@dataclass(frozen=True)
class Recording:
    """The memory of one rank. Saved as JSON by field name.

    Attributes:
        device: the device's name.
        parts: the start and the steps; empty if nothing was recorded.
    """

    rank: int
    device: str
    parts: list[RecordedStep]


def curve_from_events(events: list[dict], end_bytes: int, signs: dict[str, int], start_time: float) -> Points:
    """Return (seconds, bytes) at the start and after each event of `signs`, computed backwards from the end.

    So the curve includes what was allocated before the first event, or by events that torch dropped.

    Args:
        events: one device's events, oldest first.
        end_bytes: the bytes after the last event.
        signs: TENSOR_EVENTS or SEGMENT_EVENTS.
        start_time: start of the recording. The curve begins then, or at the first event if torch dropped any.
    """
    points: Points = []
    value = end_bytes
    for event in reversed(events):
        if sign := signs.get(event["action"]):
            points.append((event["time_us"] / 1e6, value))
            value -= sign * event["size"]
    has_dropped_events = len(events) >= MAX_EVENTS
    points.append((events[0]["time_us"] / 1e6 if has_dropped_events else start_time, value))
    return points[::-1]


def curves_from_snapshot(snapshot: dict, device: int, start_time: float) -> dict[str, Points]:
    """Return one GPU's curves {"allocated", "reserved": (seconds, bytes)}.

    "allocated" counts the requested bytes; memory_allocated() rounds each tensor up to a multiple of 512.
    "reserved" counts what torch took from the GPU. snapshot: torch.cuda.memory._snapshot() of all GPUs.
    """
    segments = [s for s in snapshot["segments"] if s["device"] == device]
    blocks = [b for s in segments for b in s["blocks"] if b["state"] == "active_allocated"]
    events = snapshot["device_traces"][device]
    allocated, reserved = sum(b["requested_size"] for b in blocks), sum(s["total_size"] for s in segments)
    return {
        "allocated": curve_from_events(events, allocated, TENSOR_EVENTS, start_time),
        "reserved": curve_from_events(events, reserved, SEGMENT_EVENTS, start_time),
    }


def clip_curve(points: Points, start: float, end: float) -> Points:
    """Return the curve from `start` to `end` as a line to draw: (seconds since `start`, value).

    A value holds until the next point, so the line has two points for each change. It is empty if the curve
    begins after `end`.
    """
    first = bisect_right(points, start, key=lambda p: p[0]) - 1
    last = bisect_right(points, end, key=lambda p: p[0])
    line = [(0.0, points[first][1])] if first >= 0 else []
    for seconds, value in points[first + 1 : last]:
        if line:
            line.append((seconds - start, line[-1][1]))
        line.append((seconds - start, value))
    return [*line, (end - start, line[-1][1])] if line else []


def thin_out(line: Points) -> Points:
    """Thin out a long line: keep the first, lowest, highest and last point in each of BUCKETS intervals.

    The intervals are equally long. A line of at most 4 * BUCKETS points is returned as it is.
    """
    if len(line) <= 4 * BUCKETS:
        return line
    chosen = {0, len(line) - 1}
    buckets: dict[int, list[int]] = {}
    for i, (seconds, _) in enumerate(line):
        buckets.setdefault(min(int(seconds / line[-1][0] * BUCKETS), BUCKETS - 1), []).append(i)
    for bucket in buckets.values():
        by_value = sorted(bucket, key=lambda i: line[i][1])
        chosen |= {bucket[0], by_value[0], by_value[-1], bucket[-1]}
    return [line[i] for i in sorted(chosen)]


def split_into_steps(starts: list[PhaseStart], curves: dict[str, Points], end: float) -> list[RecordedStep]:
    """Turn phase starts and curves in bytes into RecordedSteps in GiB; a step ends with its last phase.

    Phases and steps that end before the first known value are dropped.

    Args:
        starts: the phases' starts, in order.
        curves: name -> (seconds, bytes); the first is the memory in use.
        end: when recording stopped.
    """
    curves = {name: [(t, b / GIB) for t, b in points] for name, points in curves.items()}
    used, steps = next(iter(curves.values())), []
    ends = [s.seconds for s in starts[1:]] + [end]
    phases = [(s, e) for s, e in zip(starts, ends, strict=True) if s.name != BETWEEN_STEPS and e > s.seconds]
    for step in dict.fromkeys(s.step for s, _ in phases):
        of_step = [(s, e) for s, e in phases if s.step == step]
        start, stop = of_step[0][0].seconds, of_step[-1][1]
        spans = []
        for phase, until in of_step:
            if line := clip_curve(used, phase.seconds, until):
                peak = max(value for _, value in line)
                times = phase.seconds - start, until - start
                spans.append(RecordedPhase(phase.name, *times, peak, line[-1][1]))
        if spans:
            lines = {name: thin_out(clip_curve(points, start, stop)) for name, points in curves.items()}
            known = {name: line for name, line in lines.items() if line}
            steps.append(RecordedStep(step, stop - start, spans, known))
    return steps


class MemoryHistory:
    """Records one rank's memory from its creation until `stop`; a process has at most one at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.starts: list[PhaseStart] = []
        self.source = (GpuEvents if device.type == "cuda" else HostSamples)(device)

    def start_phase(self, name: str, step: int) -> None:
        """Mark the start of a phase, and the end of the one before it."""
        self.starts.append(PhaseStart(time.time(), step, name))

    def stop(self, rank: int, snapshot: Path) -> Recording:
        """Stop and return this rank's Recording; on a GPU, also write torch's snapshot to `snapshot`."""
        end = time.time()
        curves = self.source.stop(snapshot)
        return Recording(rank, _device_name(self.device), split_into_steps(self.starts, curves, end))


def _device_name(device: torch.device) -> str:
    """Return a GPU's name and memory (NVIDIA H200, 139.8 GiB), or "process on the CPU"."""
    if device.type != "cuda":
        return "process on the CPU"
    gib = torch.cuda.get_device_properties(device).total_memory / GIB
    return f"{torch.cuda.get_device_name(device)}, {gib:.1f} GiB"


class GpuEvents:
    """torch's record of a GPU's allocations, from its creation until `stop`."""

    def __init__(self, device: torch.device):
        self.device, self.start_time = device, time.time()
        # Stacks of Python only, and only of allocations: looking up C++ ones takes minutes.
        torch.cuda.memory._record_memory_history(
            context="alloc", stacks="python", max_entries=MAX_EVENTS, clear_history=True
        )

    def stop(self, path: Path) -> dict[str, Points]:
        """Stop the record, write torch's snapshot to `path`, and return `curves_from_snapshot`.

        https://pytorch.org/memory_viz shows the snapshot.
        """
        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        with stage_files(path.parent) as stage, stage(path.name).open("wb") as file:
            # torch.cuda.memory._dump_snapshot would take another snapshot.
            pickle.dump(snapshot, file)
        return curves_from_snapshot(snapshot, self.device.index, self.start_time)


class HostSamples:
    """Samples of this process's resident size, taken by a thread until `stop`."""

    def __init__(self, device: torch.device):
        self.device, self.stopped = device, threading.Event()
        self.points: Points = []
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        """Append a sample every SAMPLE_SECONDS until `stop`."""
        while True:
            self.points.append((time.time(), bytes_in_use(self.device)))
            if self.stopped.wait(SAMPLE_SECONDS):
                return

    def stop(self, _: Path) -> dict[str, Points]:
        """Stop sampling and return {"resident": (seconds, bytes)}; writes no file."""
        self.stopped.set()
        self.thread.join()
        return {"resident": self.points}
