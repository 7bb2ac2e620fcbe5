"""A pool of CPU processes in a gloo group that runs functions for tests.

The processes live on, so a test does not pay for their start. If a function raises in one rank, the test
fails with that rank's traceback. Without GPUs the processes come from a fork server, which does the slow
imports once. With GPUs they are spawned: the state of a GPU's driver does not survive a fork, and importing
bitsandbytes initializes it.
"""

from __future__ import annotations

import gc
import multiprocessing.context
import os
import queue
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launch.processes import find_free_port
from launch.ranks import join_process_group
from launch.signals import unblock_signals

TIMEOUT_SECONDS = 240


def _serve(rank: int, world: int, port: int, tasks, results) -> None:
    """Run tasks from a queue until None, or until one raises."""
    gc.freeze()  # the fork server's imports are never collected
    gc.enable()
    unblock_signals()  # the fork server may be that of launch/processes.py
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    rank_info = join_process_group(rank, world, rank)
    torch.set_num_threads(1)  # see conftest.py
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((rank, True, function(rank_info, *args)))
        except Exception:
            results.put((rank, False, traceback.format_exc()))
            return  # the ranks may be out of step, so this process ends
    dist.destroy_process_group()


def process_context() -> multiprocessing.context.BaseContext:
    """Return the multiprocessing context of tests; its fork server has imported the program."""
    context = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["launch.fork_server", "tests.helpers.runs"])
    return context


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
        self.processes = [
            context.Process(
                target=_serve, args=(r, self.world, port, self.tasks[r], self.results), daemon=True
            )
            for r in range(self.world)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, *args) -> list:
        if not self.processes:
            self._start()
        for tasks in self.tasks:
            tasks.put((function, args))
        answers = {}
        while len(answers) < self.world:
            try:
                rank, succeeded, value = self.results.get(timeout=TIMEOUT_SECONDS)
            except queue.Empty:
                self.close()
                raise AssertionError(
                    f"no answer within {TIMEOUT_SECONDS} s; got ranks {sorted(answers)}"
                ) from None
            if not succeeded:
                self.close()
                raise AssertionError(f"rank {rank} failed:\n{value}")
            answers[rank] = value
        return [answers[r] for r in range(self.world)]

    def close(self) -> None:
        """Kill the processes; the next call starts new ones."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
