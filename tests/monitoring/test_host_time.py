"""The host's time by part, from events as torch's profiler gives them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from monitoring.host_time import (
    AUTOGRAD,
    BUSY,
    HOOKS,
    OPERATORS,
    PYTHON,
    WAITING,
    format_host_time,
    host_time,
    read_host_time,
)

MS = 1000.0  # microseconds


def event(name: str, own_ms: float, thread: int = 1) -> SimpleNamespace:
    return SimpleNamespace(name=name, thread=thread, self_cpu_time_total=own_ms * MS)


STEP = [
    event("ProfilerStep#3", 1),
    event("forward", 2),
    event("FSDP::pre_forward (layer)", 4),
    event("aten::mm", 8),
    event("data", 16),
    event("logging", 32),
    event("cudaEventSynchronize", 64),
]


def test_each_event_counts_once_for_its_part():
    backward = [event("backward", 500), event("autograd::engine::evaluate_function: Mm", 128, thread=2)]
    seconds = host_time([*STEP, *backward], steps=2)
    expected = {PYTHON: 3, HOOKS: 4, OPERATORS: 8, "data": 16, "logging": 32, AUTOGRAD: 128, WAITING: 64}
    assert seconds == pytest.approx({part: ms / 1000 / 2 for part, ms in expected.items()})
    text = format_host_time(seconds, 2)
    assert "busy, in all                 0.0955" in text
    assert read_host_time(text) == pytest.approx(seconds | {BUSY: 0.0955}, abs=6e-5)


def test_backward_on_the_loops_own_thread_counts():
    """Without a GPU: there is no other thread whose work it waits for."""
    backward = [event("backward", 5), event("autograd::engine::evaluate_function: Mm", 128)]
    assert host_time([*STEP, *backward], steps=1)[PYTHON] == pytest.approx(0.008)


def test_a_launch_into_a_full_queue_is_waiting():
    launches = [event("cudaLaunchKernel", 0.01) for _ in range(99)] + [event("cudaLaunchKernel", 5)]
    seconds = host_time(launches, steps=1)
    assert seconds[OPERATORS] == pytest.approx(0.001) and seconds[WAITING] == pytest.approx(0.00499)
