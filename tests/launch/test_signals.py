"""Signals and clocks: the stops and saves that they request, the same on all ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time

import pytest
import torch
import torch.distributed as dist

from launch import signals
from launch.signals import (
    NO_STOP_REQUESTS,
    ReceivedSignals,
    StopRequests,
    forwarding_signals,
    unblock_signals,
)
from parallel.activation_checkpointing import start_compile_workers
from tests.helpers.distributed import process_context

STUBBORN = "trap '' TERM INT; trap 'echo saved' USR1; echo ready; while :; do sleep 0.05; done"


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) sets time.time() and time.monotonic()."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 1000.0 + seconds)


@pytest.fixture
def alone(monkeypatch):
    """A process group of one rank. Restores the signal handlers afterwards."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    before = {number: signal.getsignal(number) for number in (*signals.STOPS, signals.SAVE)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_second_stop_counts_if_it_comes_later(clock):
    again = []
    received = ReceivedSignals(again.append)
    received.handle(signal.SIGTERM)
    clock(0.5)  # the launcher forwards the terminal's signal
    received.handle(signal.SIGINT)
    assert (received.stop, again) == (signal.SIGTERM, [])
    clock(1.5)
    received.handle(signal.SIGINT)
    assert again == [signal.SIGINT]


def test_signals_ask_for_a_stop_or_a_checkpoint(alone):
    requests = StopRequests(0, time.time(), max_minutes=0, save_minutes=0)
    assert requests.poll_all_ranks(last=False) == (False, False)
    signal.raise_signal(signal.SIGUSR1)
    assert requests.poll_all_ranks(last=False) == (False, True)
    assert requests.poll_all_ranks(last=False) == (False, False)
    signal.raise_signal(signal.SIGINT)
    assert requests.poll_all_ranks(last=True) == (False, False) and requests.reason == ""  # it ends by itself
    assert requests.poll_all_ranks(last=False) == (True, False) and requests.reason == "SIGINT"


def test_a_request_that_reaches_the_ranks_in_different_steps_is_one(alone, clock, monkeypatch):
    """The other rank received it first; this one receives it during `poll_all_ranks`, or right after."""
    requests, late = StopRequests(1, time.time(), max_minutes=0, save_minutes=0), []

    def the_other_asks(tensor):
        for number in late:
            signal.raise_signal(number)
        return torch.maximum(tensor, torch.tensor([0, 1, 0, 0, 0]))

    monkeypatch.setattr(signals, "max_over_ranks", the_other_asks)
    late.append(signal.SIGUSR1)
    assert requests.poll_all_ranks(last=False) == (False, True)
    monkeypatch.setattr(signals, "max_over_ranks", lambda tensor: tensor)
    assert requests.poll_all_ranks(last=False) == (False, False)
    clock(0.5)
    signal.raise_signal(signal.SIGUSR1)
    assert requests.poll_all_ranks(last=False) == (False, False)
    clock(1.5)  # another request
    signal.raise_signal(signal.SIGUSR1)
    assert requests.poll_all_ranks(last=False) == (False, True)


def test_minutes_between_checkpoints(alone, clock):
    requests = StopRequests(0, time.time(), max_minutes=0, save_minutes=2)
    wanted = []
    for seconds in (60, 119, 121, 180, 240, 242):
        clock(seconds)
        wanted.append(requests.poll_all_ranks(last=False)[1])
    assert wanted == [False, False, True, False, False, True]
    other_rank = StopRequests(1, time.time() - 1000, max_minutes=1, save_minutes=1)
    assert not other_rank.poll_all_ranks(last=False)[0], "only rank 0's clock counts"


def test_a_run_ends_before_its_limit(alone, clock):
    requests = StopRequests(0, time.time() - 100, max_minutes=5, save_minutes=0)  # 200 seconds are left
    stops = []
    for seconds in (20, 60, 95, 119, 121):  # the longest step took 40: 2 * 40 have to be left
        clock(seconds)
        stops.append(requests.poll_all_ranks(last=False)[0])
    assert stops == [False] * 4 + [True]
    assert requests.reason == "--max_minutes"


def test_a_first_checkpoint_is_waited_for_as_long_as_one_may_take(alone, clock):
    requests = StopRequests(0, time.time(), max_minutes=5, save_minutes=0)
    requests.expect_save(100)
    requests.record_save(20, complete=False)
    stops = []
    for seconds in (10, 180, 190):  # 300 are the limit; the longest step takes 170 from here on
        clock(seconds)
        stops.append(requests.poll_all_ranks(last=False)[0])
    assert stops == [False, True, True]
    requests = StopRequests(0, time.time() - 190, max_minutes=5, save_minutes=0)
    requests.expect_save(200)
    assert requests.poll_all_ranks(last=False)[0]
    requests.record_save(20)
    assert not requests.poll_all_ranks(last=False)[0], "now it is known that it takes 20"


def test_a_checkpoint_that_takes_long_is_waited_for(alone, clock):
    requests = StopRequests(0, time.time(), max_minutes=5, save_minutes=0)
    clock(10)
    assert requests.poll_all_ranks(last=False) == (False, False)
    requests.record_save(100)
    clock(20)
    requests.record_save(60)
    assert requests.poll_all_ranks(last=False) == (False, False)
    for seconds in range(30, 181, 10):
        clock(seconds)
        assert requests.poll_all_ranks(last=False) == (False, False)
    clock(190)  # 300 are the limit: this step, another of 10 and a checkpoint of 100 come too late
    assert requests.poll_all_ranks(last=False) == (True, False)


def test_the_null_object_requests_nothing():
    assert NO_STOP_REQUESTS.poll_all_ranks(last=False) == (False, False) and NO_STOP_REQUESTS.reason == ""


@pytest.fixture
def stubborn():
    """Two processes that the signals do not end."""
    processes = [
        subprocess.Popen(["sh", "-c", STUBBORN], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert all(p.stdout.readline() == "ready\n" for p in processes)
    yield processes
    for p in processes:
        p.kill()
        p.communicate()


def test_the_parent_passes_signals_on_and_kills_at_the_second_stop(stubborn, monkeypatch):
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0)
    before = signal.getsignal(signal.SIGTERM)
    with forwarding_signals(lambda: stubborn) as (received, _):
        signal.raise_signal(signal.SIGUSR1)
        assert [p.stdout.readline() for p in stubborn] == ["saved\n"] * 2
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert [p.poll() for p in stubborn] == [None, None] and received.stop == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        assert [p.wait(10) for p in stubborn] == [-signal.SIGKILL] * 2
        signal.raise_signal(signal.SIGUSR1)  # to processes that are gone
    assert signal.getsignal(signal.SIGTERM) is before


def receive_sigterm() -> None:
    unblock_signals()
    signal.raise_signal(signal.SIGTERM)


def receive_sigterm_in_another_thread() -> None:
    thread = threading.Thread(target=receive_sigterm)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    "meanwhile",
    [lambda: os.kill(os.getpid(), signal.SIGTERM), receive_sigterm_in_another_thread],
    ids=["this thread", "another thread"],
)
def test_a_stop_while_ranks_are_started_waits_for_them(meanwhile):
    """Whichever thread of the parent receives it: signals are blocked in the starting thread only."""
    rank = subprocess.Popen(["sleep", "60"])

    def start() -> list:
        meanwhile()
        return [rank]

    with forwarding_signals(start) as (received, ranks):
        assert rank.wait(10) == -signal.SIGTERM and received.stop == signal.SIGTERM and ranks == [rank]


def test_a_second_stop_while_ranks_are_started_kills_them(monkeypatch):
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0)
    rank = subprocess.Popen(["sh", "-c", "trap : TERM; sleep 60"])

    def start() -> list:
        receive_sigterm_in_another_thread()
        receive_sigterm_in_another_thread()
        return [rank]

    with forwarding_signals(start):
        assert rank.wait(10) == -signal.SIGKILL


def compile_for_a_while(messages) -> None:
    """Use compile workers in a new process group, and report whether SIGTERM reached only this process."""
    from torch._inductor.async_compile import AsyncCompile

    os.setsid()
    unblock_signals()
    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    start_compile_workers(2)
    pool = AsyncCompile.process_pool()
    assert pool.submit(sum, (1, 2)).result() == 3
    working = pool.submit(time.sleep, 3)
    messages.put("ready")
    working.result()
    messages.put(received == [signal.SIGTERM])


@pytest.mark.slow
def test_a_signal_to_the_whole_group_ends_no_compilation():
    """The compile workers go on; the process itself receives the signal."""
    messages = process_context().Queue()
    process = process_context().Process(target=compile_for_a_while, args=(messages,))
    process.start()
    try:
        assert messages.get(timeout=90) == "ready"
        os.killpg(process.pid, signal.SIGTERM)
        assert messages.get(timeout=90) is True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
