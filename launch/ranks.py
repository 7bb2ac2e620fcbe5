"""The ranks of a run: their number, how they share a model, and the device and CPUs of each."""

from __future__ import annotations

import contextlib
import math
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from launch import memory
from launch.devices import set_current_device
from launch.nccl import reach_gpus, tell_of_silence
from launch.program import is_under_torchrun
from options.errors import UserError, describe

MAX_CPU_RANKS = 16  # allowed on any machine, for trying things out; more only with as many CPUs
T = TypeVar("T")


@dataclass(frozen=True)
class RankInfo:
    """Who this process is among the ranks of a run.

    Attributes:
        rank, world: global rank and number of ranks.
        local_rank, local_world: the same within its node.
        device: the GPU that it computes on, or the CPU.
        cpus: CPUs available to this rank: its fair share of the node's.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    cpus: int = 1


def max_gpu_ranks() -> float:
    """Return how many ranks this machine's GPUs can have: their number, or infinity if ranks may share them.

    They may, for trying things out, where the user has told NCCL (2.30 and later) to allow it.
    """
    gpus = torch.cuda.device_count()
    return math.inf if gpus and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" else gpus


def resolve_world_size(option: int) -> int:
    """Return the number of ranks: torchrun's, else `option`, where -1 = all GPUs, or two CPU processes.

    option: --world_size. Raises UserError if GPUs or CPUs cannot have so many, or torchrun has started
    another number.
    """
    gpus = torch.cuda.device_count()
    if is_under_torchrun():
        world = read_env_int("WORLD_SIZE")
        local = local_world_size(world)
        if option not in (-1, world):
            raise UserError(
                f"--world_size {option}: torchrun started {world} processes; leave the option out"
            )
        if gpus and local > max_gpu_ranks():
            raise UserError(f"torchrun started {local} processes on a node with {gpus} GPUs")
        return world
    if gpus and option > max_gpu_ranks():
        raise UserError(f"--world_size {option}: this machine has {gpus} GPU{'s' * (gpus > 1)}")
    if not gpus and option > (most := max(MAX_CPU_RANKS, os.cpu_count() or 1)):
        raise UserError(f"--world_size {option}: at most {most} processes without a GPU on this machine")
    return option if option > 0 else gpus or 2


def local_world_size(world: int) -> int:
    """Return the number of ranks on this machine: all, unless torchrun or Slurm started them.

    Raises UserError if the launcher's environment variables do not give the number, or if it cannot be right.
    """
    if not is_under_torchrun():
        return world
    text = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE", "")
    if not text.isdecimal() or not 0 < int(text) <= world:
        raise UserError(
            "RANK and WORLD_SIZE are set, but not LOCAL_WORLD_SIZE, the number of ranks on this node"
        )
    if world % int(text):
        raise UserError(f"{text} of {world} ranks are on this node: all nodes must have the same number")
    return int(text)


def resolve_strategy(option: str, world: int) -> str:
    """Return `option`; for auto, hybrid_full_shard on several nodes of several ranks each, else full_shard.

    option: --sharding_strategy. Hybrid strategies shard within nodes: GPUs of one node have faster links to
    one another than to those of other nodes.
    """
    if option != "auto":
        return option
    return "hybrid_full_shard" if 1 < local_world_size(world) < world else "full_shard"


def resolve_group_size(option: int, world: int) -> int:
    """Return the number of ranks of a sharding group: `option`, where -1 = the ranks of one node.

    option: --hybrid_shard_size. Raises UserError if `world` ranks cannot be divided into such groups.
    """
    size = option if option > 0 else local_world_size(world)
    if world % size:
        raise UserError(
            f"--hybrid_shard_size {size}: {world} processes cannot be divided into groups of {size}"
        )
    return size


def resolve_workers(option: int, cpus: int) -> int:
    """Return the number of threads for --loading_workers `option`, where -1 = `cpus`, at most 4."""
    return option if option > 0 else min(4, cpus)


def gather_from_ranks(value: T, world: int, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the values of all ranks, in the order of ranks. Collective.

    Args:
        value: this rank's, picklable.
        world: number of ranks in the group.
        group: None = all ranks.
    """
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the element-wise maximum of all ranks' values, on the host. Collective.

    In round k each rank sends to the rank 2^k after it (a dissemination barrier: Hensgen, Finkel and Manber,
    1988). That is log2(world) messages, one after the other. gloo's all-reduce is a ring of 2 (world - 1)
    messages, one after the other, and every step of a run would wait for them.
    """
    world, distance = dist.get_world_size(), 1
    while distance < world:
        rank, received = dist.get_rank(), torch.empty_like(values)
        sent = dist.isend(values, (rank + distance) % world)
        dist.recv(received, (rank - distance) % world)
        assert sent is not None
        sent.wait()
        values, distance = torch.maximum(values, received), 2 * distance
    return values


@contextlib.contextmanager
def errors_on_all_ranks(world: int, remark: str = "") -> Iterator[None]:
    """Within the context, let all ranks raise the UserError of the first rank that raises one. Collective.

    Otherwise the others would wait for that rank in their next forward.

    Args:
        world: number of ranks.
        remark: what follows the error's line.
    """
    line = ""
    try:
        yield
    except UserError as e:
        line = describe(e)
    if line := next(filter(None, gather_from_ranks(line, world)), ""):
        raise UserError(line + remark)


def smallest_gpu_room(rank_info: RankInfo) -> float:
    """Return the `gpu_room` of the rank that has least of it, on all ranks. Collective."""
    return min(gather_from_ranks(memory.gpu_room(rank_info.device), rank_info.world))


def count_cpus() -> int:
    """Return how many CPUs this process may use: those it may run on, up to its container's quota."""
    return max(1, int(min(len(_cpu_set()), read_cpu_quota())))


def _cpu_set() -> set[int]:
    """Return the numbers of the CPUs that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def read_cpu_quota(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Return how many CPUs' time the container may use (docker run --cpus); infinity without a quota.

    folder: where the control groups are mounted, of version 2 or 1.
    """
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        # Missing files, "max", or a quota of -1: no quota.
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = map(int, " ".join((folder / name).read_text() for name in files).split())
            if quota > 0:
                return quota / period
    return math.inf


def count_cpus_per_rank(local_rank: int, rank: int, local_world: int, world: int) -> int:
    """Return how many of the CPUs that this rank may run on are its fair share. Collective, over all ranks.

    They are divided by the number of ranks of the node that may run on any of them. A container's quota is
    divided by the number of all ranks of the node.

    Args:
        local_rank: this rank within its node.
        rank: this rank among all ranks; the ranks of a node are consecutive.
        local_world: number of ranks on the node.
        world: number of all ranks.
    """
    own = _cpu_set()
    first = rank - local_rank
    of_node = gather_from_ranks(own, world)[first : first + local_world]
    sharing = sum(not own.isdisjoint(others) for others in of_node)
    return max(1, int(min(len(own) // sharing, read_cpu_quota() / local_world)))


def set_torch_threads(cpus: int, local_world: int) -> None:
    """Let torch's CPU operations use `cpus` threads, unless the user has set OMP_NUM_THREADS.

    These operations include the optimizer step with --use_cpu_offload. By default torch starts one thread per
    CPU of the machine in each rank. With more threads than CPUs each operation waits for a thread that is not
    scheduled, and takes up to a hundred times as long.
    """
    requested = os.environ.get("OMP_NUM_THREADS", "")
    # torchrun sets 1 for several ranks if the user has set nothing.
    if not requested or (requested == "1" and local_world > 1 and "TORCHELASTIC_RUN_ID" in os.environ):
        torch.set_num_threads(cpus)


def read_env_int(name: str) -> int:
    """Return an environment variable as a whole number. Raises UserError if it is missing or not one."""
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment: not a whole number; torchrun sets it")
    return int(text)


def raise_file_limit() -> None:
    """Let this process open as many files as the system allows. Call before the first process group.

    gloo opens a socket for every other rank and group, and many systems begin with a limit of 1,024.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # macOS reports a limit that it does not accept
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def join_process_group(rank: int, world: int, local_rank: int, store: dist.Store | None = None) -> RankInfo:
    """Join the default process group, set this rank's device and threads, return its RankInfo. Collective.

    The backend is NCCL for GPU tensors and gloo for host tensors. If the GPUs cannot reach one another, this
    waits, and a line says what may help.

    Args:
        rank: this rank among all ranks.
        world: number of all ranks.
        local_rank: this rank within its node, which selects its GPU.
        store: where the ranks find one another; None = at MASTER_ADDR and MASTER_PORT.

    Raises UserError if LOCAL_RANK does not fit.
    """
    raise_file_limit()
    local_world = local_world_size(world)
    if rank % local_world != local_rank:
        raise UserError(
            f"rank {rank} has LOCAL_RANK {local_rank}: each node must have {local_world} ranks in a row"
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        set_current_device(device)
        with tell_of_silence(local_rank, local_world):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl", rank=rank, world_size=world, store=store, device_id=device
            )
            reach_gpus(device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    cpus = count_cpus_per_rank(local_rank, rank, local_world, world)
    set_torch_threads(cpus, local_world)
    return RankInfo(rank, world, local_rank, local_world, device, cpus)
