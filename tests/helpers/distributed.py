"""Runs functions in a group of CPU processes over gloo. The processes stay, so that a test does not pay
for their start; a function that raises in one rank fails the test with that rank's traceback.

Without GPUs they come from a fork server, which has imported what costs seconds once for all of them. What a GPU's
driver has set up does not outlive a fork, and importing bitsandbytes asks it.
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
    gc.freeze()  # all that the fork server has imported stays
    gc.enable()
    unblock_signals()  # the server may be one that launch/processes.py has started
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    rank_info = join_process_group(rank, world, rank)
    torch.set_num_threads(1)  # as conftest.py says
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((rank, True, function(rank_info, *args)))
        except Exception:
            results.put((rank, False, traceback.format_exc()))
            return  # the group may be out of step: no more work for this process
    dist.destroy_process_group()


def new_processes() -> multiprocessing.context.BaseContext:
    """Where tests get processes from that know the program without importing it."""
    context = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["launch.fork_server", "tests.helpers.runs"])
    return context


def once(ranks: Callable, function: Callable) -> Callable:
    """get(args) -> what function returns on rank 0 of `ranks`; computed once for the same arguments."""
    made = {}

    def get(args):
        key = tuple(map(str, args))
        if key not in made:
            made[key] = ranks(function, args)[0]
        return made[key]

    return get


class Ranks:
    """`world` processes in one group; call it like a function."""

    def __init__(self, world: int):
        self.world, self.processes = world, []

    def _start(self) -> None:
        context = new_processes()
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
                rank, good, value = self.results.get(timeout=TIMEOUT_SECONDS)
            except queue.Empty:
                self.close()
                raise AssertionError(
                    f"no answer within {TIMEOUT_SECONDS} s; got ranks {sorted(answers)}"
                ) from None
            if not good:
                self.close()
                raise AssertionError(f"rank {rank} failed:\n{value}")
            answers[rank] = value
        return [answers[r] for r in range(self.world)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
