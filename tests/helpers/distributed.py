"""A pool of CPU processes in a gloo group that runs functions for tests.

The processes live on, so a test does not pay for their start. If a function raises in one rank, or a process
dies, the test fails with every rank's traceback or exit code. Without GPUs the processes come from a fork
server, which does the slow imports once. With GPUs they are spawned: the state of a GPU's driver does not
survive a fork, and importing bitsandbytes initializes it.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import multiprocessing.context
import multiprocessing.forkserver
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launch.processes import find_free_port
from launch.ranks import join_process_group
from launch.signals import unblock_signals

TIMEOUT_SECONDS = 240
# Each run imports them later, which takes a second.
IMPORTED_LATER = ["bitsandbytes", "matplotlib.figure", "matplotlib.backends.backend_agg"]
DEATH_SECONDS = 5.0  # how long the other ranks have to fail, too, once one has


def _serve(rank: int, world: int, port: int, tasks, results, crash_report: str) -> None:
    """Run tasks from a queue until None, or until one raises.

    crash_report: the file that gets the traceback of a fatal signal.
    """
    faulthandler.enable(open(crash_report, "w"))  # noqa: SIM115 (open for as long as the process lives)
    gc.freeze()  # the fork server's imports are never collected
    gc.enable()
    # As often as Python does, it takes a tenth of the time. On GPUs, tests count bytes that it may hold.
    if not torch.cuda.is_available():
        gc.set_threshold(50_000, 20, 100)
    unblock_signals()  # the fork server may be that of launch/processes.py
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    rank_info = join_process_group(rank, world, rank)
    torch.set_num_threads(1)  # see conftest.py
    while (task := tasks.get()) is not None:
        function, args = _load(task)
        try:
            results.put((rank, True, _dump(function(rank_info, *args))))
        except Exception:
            results.put((rank, False, traceback.format_exc()))
            return  # the ranks may be out of step, so this process ends
    dist.destroy_process_group()


def _dump(value) -> bytes:
    """Serialize a task or a result.

    torch's queues would share the memory of each tensor, and open and check a connection for each: several
    times as slow for small tensors.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(raw: bytes):
    return torch.load(io.BytesIO(raw), weights_only=False)


def process_context() -> multiprocessing.context.BaseContext:
    """Return the multiprocessing context of tests; its fork server has imported the program."""
    context = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["launch.fork_server", "tests.helpers.runs", *IMPORTED_LATER])
    return context


def start_fork_server() -> None:
    """Start the tests' fork server, so that train.py in this process does not start its own."""
    if process_context().get_start_method() == "forkserver":
        multiprocessing.forkserver.ensure_running()


def cache_results(ranks: Callable, function: Callable) -> Callable:
    """Return get(args), the cached result of function(rank_info, args) on rank 0 of `ranks`."""
    results = {}

    def get(args):
        key = tuple(map(str, args))
        if key not in results:
            results[key] = ranks(function, args)[0]
        return results[key]

    return get


class RankPool:
    """`world` processes in one group; pool(function, *args) returns the results of all ranks."""

    def __init__(self, world: int):
        self.world, self.processes = world, []

    def _start(self) -> None:
        """Start the processes."""
        context = process_context()
        self.results, port = context.Queue(), find_free_port()
        self.tasks = [context.Queue() for _ in range(self.world)]
        self.crash_reports = [tempfile.NamedTemporaryFile("r") for _ in range(self.world)]  # noqa: SIM115
        self.processes = [
            context.Process(
                target=_serve,
                args=(rank, self.world, port, self.tasks[rank], self.results, self.crash_reports[rank].name),
                daemon=True,
            )
            for rank in range(self.world)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, *args) -> list:
        if not self.processes:
            self._start()
        task = _dump((function, args))
        for tasks in self.tasks:
            tasks.put(task)
        answers, failures = {}, {}
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(answers) < self.world:
            try:
                rank, succeeded, value = self.results.get(timeout=1)
                (answers if succeeded else failures)[rank] = value
            except queue.Empty:
                pass
            dead = any(process.exitcode is not None for process in self.processes)
            if (failures or dead) and len(failures) + len(answers) < self.world:
                deadline = min(deadline, time.monotonic() + DEATH_SECONDS)
            elif failures:
                break
            if time.monotonic() > deadline:
                break
        if len(answers) == self.world:
            return [_load(answers[rank]) for rank in range(self.world)]
        report = "\n".join(self._describe(rank, answers, failures) for rank in range(self.world))
        self.close()
        raise AssertionError(report)

    def _describe(self, rank: int, answers: dict, failures: dict) -> str:
        if rank in answers:
            return f"rank {rank} succeeded"
        if rank in failures:
            return f"rank {rank} failed:\n{failures[rank]}"
        code = self.processes[rank].exitcode
        state = "gave no answer" if code is None else f"died with exit code {code}"
        return f"rank {rank} {state}\n{self.crash_reports[rank].read()}"

    def close(self) -> None:
        """Kill the processes; the next call starts new ones."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
