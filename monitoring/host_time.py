"""What the host does in a step, by part, from the events of torch's profiler (--profile).

A host that takes longer for a step than the GPU holds it up. Waiting is taken away: for the GPU, and for room
in its queue of launches, where a launch takes far longer than usual.

The profiler itself slows the host, by a quarter and more. So the parts' shares are right, and their sum is
too high; `benchmarks.host` measures the sum without a profiler.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from typing import Protocol

from data.prefetch import DATA
from monitoring.deferred import LOGGING

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaEventQuery")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
LONG_LAUNCH = 10  # times the median of its kind: the queue is full, and the host waits
PHASES = ("forward", "backward", "optimizer")
WAITING, OPERATORS, HOOKS, AUTOGRAD, PYTHON = (
    "waiting for the GPU",
    "operators and launches",
    "FSDP's hooks",
    "autograd",
    "Python between operators",
)
BUSY = "busy, in all"  # the sum of PARTS, in the table
PARTS = (OPERATORS, HOOKS, AUTOGRAD, DATA, LOGGING, PYTHON)


class ProfiledEvent(Protocol):
    """An event of torch's profiler on a thread of the host; `self` times are without those within it."""

    name: str
    thread: int
    self_cpu_time_total: float  # microseconds


def part_of(name: str) -> str:
    """Return the part of a step that an event belongs to, by its name, which is torch's, or the program's."""
    if name in WAITS:
        return WAITING
    if name.startswith("FSDP::"):
        return HOOKS
    if name.startswith("autograd::"):
        return AUTOGRAD
    if name in (DATA, LOGGING):
        return name
    return PYTHON if name in PHASES or name.startswith("ProfilerStep") else OPERATORS


def host_time(events: Iterable[ProfiledEvent], steps: int) -> dict[str, float]:
    """Return {part: host seconds per step}, of PARTS and WAITING.

    Backward's own time on the thread of the loop counts as nothing where another thread computes backward:
    the loop only waits for it.

    Args:
        events: of the host, recorded in whole steps.
        steps: their number.
    """
    events = list(events)
    usual = {
        name: statistics.median(e.self_cpu_time_total for e in events if e.name == name)
        for name in {e.name for e in events} & set(LAUNCHES)
    }
    loop_threads = {e.thread for e in events if e.name in PHASES}
    has_own_thread = any(e.thread not in loop_threads and part_of(e.name) == AUTOGRAD for e in events)
    seconds = dict.fromkeys((*PARTS, WAITING), 0.0)
    for event in events:
        own = event.self_cpu_time_total
        if event.name == "backward" and has_own_thread:
            continue
        if event.name in usual and own > LONG_LAUNCH * usual[event.name]:
            seconds[WAITING] += own - usual[event.name]
            own = usual[event.name]
        seconds[part_of(event.name)] += own
    return {part: own / 1e6 / steps for part, own in seconds.items()}


def format_host_time(seconds: dict[str, float], steps: int) -> str:
    """Return the table of `host_time`'s result as text."""
    busy = sum(seconds[part] for part in PARTS)
    lines = [f"host seconds per step, of {steps} steps under the profiler, which slows the host", ""]
    lines += [f"{part:<26} {seconds[part]:8.4f} {seconds[part] / busy if busy else 0:5.0%}" for part in PARTS]
    lines += [f"{BUSY:<26} {busy:8.4f}", f"{WAITING:<26} {seconds[WAITING]:8.4f}"]
    return "\n".join(lines) + "\n"


def read_host_time(text: str) -> dict[str, float]:
    """Return {part: host seconds per step}, of PARTS, BUSY and WAITING, as `format_host_time` wrote them."""
    found = re.findall(r"^(\S.*?) +(\d+\.\d+)(?: +\d+%)?$", text, re.MULTILINE)
    return {part: float(seconds) for part, seconds in found}
