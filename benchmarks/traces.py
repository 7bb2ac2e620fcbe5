"""Communication in a trace of `--profile`: what of it no computation hides."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

ON_GPU = "kernel", "gpu_memcpy", "gpu_memset"  # categories of a trace's events
COMMUNICATION = "nccl", "PtoP"  # within the names of collectives' kernels, and of copies between GPUs

Span = tuple[float, float]  # start and end, in microseconds


def exposed_seconds(trace: Path, steps: int) -> float | None:
    """Return the seconds per step in which a GPU did nothing but communicate; None without GPU events.

    Args:
        trace: rank<N>_trace.json.gz.
        steps: recorded in it.
    """
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    communication: list[Span] = []
    computation: list[Span] = []
    for event in events:
        if event.get("cat") in ON_GPU:
            is_communication = any(word in event["name"] for word in COMMUNICATION)
            spans = communication if is_communication else computation
            spans.append((event["ts"], event["ts"] + event["dur"]))
    if not communication and not computation:
        return None
    together = covered(communication + computation)
    return (together - covered(computation)) / 1e6 / steps


def covered(spans: list[Span]) -> float:
    """Return the microseconds that at least one of the spans covers."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
