"""Ranks before a run's own: a launch of processes that are gone before the run's ranks start.

A trial of a setting (training/trial.py) runs in them, so that no memory, state or random number of it reaches
the run. `python train.py` starts all ranks of a launch. Under torchrun each rank starts its own one.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from launch import nodes, processes
from launch.failures import Failure
from launch.ranks import gather_from_ranks

T = TypeVar("T")


@dataclass(frozen=True)
class RankFunction:
    """A function that only the ranks import, by its name: that would take time in the process before them.

    Attributes:
        module: of the function, which must be at its top level.
        name: of the function.
    """

    module: str
    name: str

    def __call__(self, *args):
        """Import the function and call it."""
        return getattr(importlib.import_module(self.module), self.name)(*args)


class Launcher:
    """Starts ranks on this machine, all of them.

    Args:
        world: number of ranks.
        address, port: of rank 0. port None = a free one.
        preload: modules that ranks need.
    """

    def __init__(self, world: int, address: str, port: int | None, preload: Sequence[str] = ()):
        self.world, self.address, self.port, self.preload = world, address, port, preload

    def run_apart(self, run: Callable, *args) -> list[Failure]:
        """Run run(rank_info, *args) in new processes and wait for them. Return how they failed, or [].

        The result is the same on all ranks. Exits if a signal ends the launch.
        """
        processes.set_meeting_point(self.address, self.port)
        ranks = processes.RankRange(self.world, self.world)
        failure = processes.run_ranks(run, ranks, args, preload=self.preload)
        _exit_if_stopped(failure)
        return [failure] if failure else []

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes that start ranks: here this one's."""
        return [value]

    def check(self, check: Callable[[], nodes.AnyJob]) -> nodes.AnyJob:
        """Return check(), the job, on all ranks. Raises UserError for what is wrong with it."""
        return check()


class TorchrunLauncher(Launcher):
    """Starts one rank for each rank of torchrun. All methods are collective, in a group that uses no GPU.

    Args:
        store: of all ranks.
        rank, world: this rank and the number of ranks.
        local_rank: this rank within its node.
        started: time.time() when the run started.
        preload: as for Launcher.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        local_rank: int,
        started: float,
        preload: Sequence[str] = (),
    ):
        super().__init__(world, os.environ["MASTER_ADDR"], None, preload)
        self.store, self.rank, self.local_rank, self.started = store, rank, local_rank, started
        self.launches = 0

    def run_apart(self, run: Callable, *args) -> list[Failure]:
        self.launches += 1
        failed_key = f"launch {self.launches} failed"
        ranks = processes.RankRange(self.world, 1, self.rank, self.local_rank)
        failure = processes.run_ranks(
            run,
            ranks,
            args,
            self._environment(),
            self.preload,
            failed_elsewhere=lambda: self.store.check([failed_key]),
        )
        if failure:
            self.store.set(failed_key, "")
        _exit_if_stopped(failure)
        return [each for each in self.gather(failure) if each]

    def _environment(self) -> dict[str, str]:
        """Return the environment of a new rank: this one's, with a port of its own to meet at."""
        port = [_find_free_port()]
        dist.broadcast_object_list(port, src=0)  # of rank 0's host
        # Otherwise the new ranks would look for torchrun's own store at that port.
        inherited = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_USE_AGENT_STORE"}
        return inherited | {"MASTER_PORT": str(port[0])}

    def gather(self, value: T) -> list[T]:
        return gather_from_ranks(value, self.world)

    def check(self, check: Callable[[], nodes.AnyJob]) -> nodes.AnyJob:
        return nodes.check_on_nodes(check, self.rank, self.world, self.local_rank, self.started)


def _find_free_port() -> int:
    """Return a TCP port that is free on all addresses of this host."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _exit_if_stopped(failure: Failure | None) -> None:
    """End this process if a signal has ended its ranks: it was sent to this process, which forwarded it."""
    if failure and failure.status > 128:
        raise SystemExit(failure.print())
