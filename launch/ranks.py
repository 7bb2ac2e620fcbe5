"""The ranks of a run: how many there are, how they share a model, and what each one runs on."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launch.devices import use
from launch.program import under_torchrun
from options.errors import UserError

CPU_RANKS = 16  # on any machine, for trying things out; more only where there are processors for them


@dataclass(frozen=True)
class RankInfo:
    """Where a process stands: global rank and number of ranks; the same within its node; its device; its share of the
    processors."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    processors: int = 1


def ranks_on_gpus() -> float:
    """How many ranks the GPUs here may have: one each, or any number, for trying things out, where NCCL (2.30 and later)
    is told to let ranks share one."""
    gpus = torch.cuda.device_count()
    return math.inf if gpus and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" else gpus


def resolve_world_size(wanted: int) -> int:
    """--world_size, or its default: all GPUs, or two CPU processes. Raises UserError beyond the GPUs."""
    gpus = torch.cuda.device_count()
    if under_torchrun():
        world = number_in_environment("WORLD_SIZE")
        local = local_world_size(world)
        if wanted not in (-1, world):
            raise UserError(
                f"--world_size {wanted}: torchrun started {world} processes; leave the option out"
            )
        if gpus and local > ranks_on_gpus():
            raise UserError(f"torchrun started {local} processes on a node with {gpus} GPUs")
        return world
    if gpus and wanted > ranks_on_gpus():
        raise UserError(f"--world_size {wanted}: this machine has {gpus} GPU{'s' * (gpus > 1)}")
    if not gpus and wanted > (most := max(CPU_RANKS, os.cpu_count() or 1)):
        raise UserError(f"--world_size {wanted}: at most {most} processes without a GPU on this machine")
    return wanted if wanted > 0 else gpus or 2


def local_world_size(world: int) -> int:
    """The number of ranks on this machine: all, unless something else started them and says so. Raises UserError
    if it does not say so."""
    if not under_torchrun():
        return world
    text = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE", "")
    if not text.isdecimal() or not 0 < int(text) <= world:
        raise UserError(
            "RANK and WORLD_SIZE are set, but not LOCAL_WORLD_SIZE, the number of ranks on this node"
        )
    if world % int(text):
        raise UserError(f"{text} of {world} ranks are on this node: all nodes must have the same number")
    return int(text)


def resolve_strategy(wanted: str, world: int) -> str:
    """--sharding_strategy, or its default: shards within nodes, whose GPUs are closer to one another than to those
    of another node, if there are several of both."""
    if wanted != "auto":
        return wanted
    return "hybrid_full_shard" if 1 < local_world_size(world) < world else "full_shard"


def resolve_group_size(wanted: int, world: int) -> int:
    """--hybrid_shard_size, or its default: the ranks of one node. Raises UserError if groups would differ."""
    size = wanted if wanted > 0 else local_world_size(world)
    if world % size:
        raise UserError(
            f"--hybrid_shard_size {size}: {world} processes cannot be divided into groups of {size}"
        )
    return size


def resolve_workers(wanted: int, processors: int) -> int:
    """--loading_workers, or its default: the rank's share of the processors, at most 4."""
    return wanted if wanted > 0 else min(4, processors)


def share_of_processors(local_rank: int, rank: int, local_world: int, world: int) -> int:
    """How many of those that this rank may run on are left for it, if those on which others of its node may run as well are
    divided. Collective."""
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    everywhere: list[set[int]] = [set()] * world
    dist.all_gather_object(everywhere, here)
    first = rank - local_rank
    sharing = sum(not here.isdisjoint(others) for others in everywhere[first : first + local_world])
    return max(1, len(here) // sharing)


def set_threads(processors: int, local_world: int) -> None:
    """Of operations on host tensors, such as the optimizer's with --use_cpu_offload: as many, unless OMP_NUM_THREADS says
    how many; torchrun says 1 for several ranks where nobody does. torch would start as many in each rank as there are
    processors; where more run than that, each operation waits for one that is not scheduled, up to a hundred times as long
    as it takes."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if not asked or (asked == "1" and local_world > 1 and "TORCHELASTIC_RUN_ID" in os.environ):
        torch.set_num_threads(processors)


def number_in_environment(name: str) -> int:
    """A whole number in the environment. Raises UserError."""
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment: not a whole number; torchrun sets it")
    return int(text)


def join_group(rank: int, world: int, local_rank: int, store: dist.Store | None = None) -> RankInfo:
    """Makes this process one of the group: NCCL on GPUs (gloo beside it for host tensors), else gloo.

    The ranks find one another in `store`; without one, at MASTER_ADDR and MASTER_PORT.
    """
    local_world = local_world_size(world)
    if rank % local_world != local_rank:
        raise UserError(
            f"rank {rank} has LOCAL_RANK {local_rank}: each node must have {local_world} ranks in a row"
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        use(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", rank=rank, world_size=world, store=store, device_id=device
        )
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    processors = share_of_processors(local_rank, rank, local_world, world)
    set_threads(processors, local_world)
    return RankInfo(rank, world, local_rank, local_world, device, processors)
