"""Starts one process per GPU (or CPU rank), and ends all of them when one fails, with that one's message.

Two ways in, one way through: `start` spawns the processes itself; under torchrun (or anything else that
sets RANK, WORLD_SIZE and LOCAL_RANK) this process already is one of them.
"""

from __future__ import annotations

import json
import multiprocessing.connection
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from command_line import describe, under_torchrun
from config import UserError
from stopping import SAVE, forwarding


@dataclass(frozen=True)
class Place:
    """Where a process stands: global rank and number of ranks; the same within its node; its device."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device


def resolve_world_size(wanted: int) -> int:
    """--world_size, or its default: all GPUs, or two CPU processes. Raises UserError beyond the GPUs."""
    gpus = torch.cuda.device_count()
    if under_torchrun():
        world = int(os.environ["WORLD_SIZE"])
        local = local_world_size(world)
        if wanted not in (-1, world):
            raise UserError(
                f"--world_size {wanted}: torchrun started {world} processes; leave the option out"
            )
        if gpus and local > gpus:
            raise UserError(f"torchrun started {local} processes on a node with {gpus} GPUs")
        return world
    if gpus and wanted > gpus:
        raise UserError(f"--world_size {wanted}: this machine has {gpus} GPU{'s' * (gpus > 1)}")
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
    return int(text)


def resolve_group_size(wanted: int, world: int) -> int:
    """--hybrid_shard_size, or its default: the ranks of one node. Raises UserError if groups would differ."""
    size = wanted if wanted > 0 else local_world_size(world)
    if world % size:
        raise UserError(
            f"--hybrid_shard_size {size}: {world} processes cannot be divided into groups of {size}"
        )
    return size


def resolve_workers(wanted: int, local_world: int) -> int:
    """--loading_workers, or its default: the rank's share of the processors, at most 4."""
    return wanted if wanted > 0 else min(4, max(1, (os.cpu_count() or 1) // local_world))


def join_group(rank: int, world: int, local_rank: int, store: dist.Store | None = None) -> Place:
    """Makes this process one of the group: NCCL on GPUs (gloo beside it for host tensors), else gloo.

    The ranks find one another in `store`; without one, at MASTER_ADDR and MASTER_PORT.
    """
    local_world = local_world_size(world)
    if rank % local_world != local_rank:
        raise UserError(
            f"rank {rank} has LOCAL_RANK {local_rank}: each node must have {local_world} ranks in a row"
        )
    where = {"rank": rank, "world_size": world, "store": store}
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **where)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
        dist.init_process_group("gloo", **where)
    return Place(rank, world, local_rank, local_world, device)


def start(run: Callable, world: int, args: tuple, address: str, port: int | None) -> int:
    """Runs run(place, *args) in `world` new processes and waits. Returns the exit status to end with.

    If one fails, the others are ended at once and its message is printed: `error: rank 1: ...`.
    """
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port or free_port())}
    if address in ("localhost", "127.0.0.1") and Path("/sys/class/net/lo").exists():
        # Otherwise gloo looks up the host's own name, which fails on machines without a DNS entry.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not torch.cuda.is_available():
        # Threads with nothing to do sleep. They would spin, and beside any other load each short operation would
        # wait for one that is not scheduled. Read by the ranks when they import torch.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A rank that is ended at once cannot put away its locks; the clean-up's warning would follow the error.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    with tempfile.TemporaryDirectory() as reports:
        # To a rank that does not listen yet it means nothing: the disposition goes over to the new processes.
        signal.signal(SAVE, signal.SIG_IGN)
        context = mp.spawn(_rank_process, (run, world, args, reports), nprocs=world, join=False)
        with forwarding(context.pids()) as received:
            failed = _wait(context.processes)
        if failed and received.stop:
            print(f"ended by {received.stop.name}", file=sys.stderr)
            return 128 + received.stop
        return _explain(failed, Path(reports)) if failed else 0


def join(run: Callable, prepare: Callable) -> int:
    """Under torchrun: rank 0 prepares (reads, checks, tokenizes) before any GPU is touched, the others wait
    to receive the result; then all run(place, result). Returns the exit status; UserErrors pass through."""
    rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    box = [prepare() if rank == 0 else None]
    try:
        # A first group only to wait for rank 0: the GPUs are touched after its checks. Each group has its own
        # part of the store: in a common one the second would find the addresses of the first, already closed.
        store = own_store(next(dist.rendezvous("env://"))[0], rank)
        first = dist.PrefixStore("prepare", store)
        dist.init_process_group("gloo", store=first, rank=rank, world_size=world)
        dist.broadcast_object_list(box, src=0)
        dist.destroy_process_group()
        run(join_group(rank, world, local_rank, dist.PrefixStore("train", store)), box[0])
        dist.destroy_process_group()
        return 0
    except Exception as e:
        traceback.print_exc()
        print(f"error: rank {rank}: {describe(e)}", file=sys.stderr, flush=True)
        os._exit(2 if isinstance(e, UserError) else 1)


def own_store(shared: dist.Store, rank: int) -> dist.Store:
    """A store of this start of the ranks. torchrun's own, `shared`, may outlive them: after --max-restarts has
    replaced them it would still hold the addresses of those that are gone. So rank 0 serves a new one, and the others
    try the port that stands in `shared` until it is the new one's."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return shared
    host, ends = os.environ["MASTER_ADDR"], time.monotonic() + dist.default_pg_timeout.total_seconds()
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        shared.set("port", str(store.port))
        return store
    while True:
        port = int(shared.get("port"))
        try:
            socket.create_connection((host, port), timeout=5).close()  # a store's client would try for long
            return dist.TCPStore(host, port, is_master=False)
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _end_with_parent() -> None:
    """torch's own way, a SIGINT when the parent dies, is lost in jobs that a shell starts with `&`."""
    mp.parent_process().join()
    os._exit(1)


def _rank_process(rank: int, run: Callable, world: int, args: tuple, reports: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    status = 0
    try:
        run(join_group(rank, world, rank), *args)
        dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as e:  # of any kind: the parent tells it, and ends the others
        status = 2 if isinstance(e, UserError) else 1
        report = {"time": time.time(), "rank": rank, "status": status, "message": describe(e)}
        report["traceback"] = "" if status == 2 else traceback.format_exc()
        (Path(reports) / f"{rank}.tmp").write_text(json.dumps(report))
        (Path(reports) / f"{rank}.tmp").rename(Path(reports) / f"{rank}.json")
    sys.stdout.flush()
    sys.stderr.flush()
    # At once. After a failure an ordinary exit would wait for collectives that cannot end any more. After a success
    # it takes down the libraries with their threads still running, which has ended in SIGABRT: the parent would take
    # that for a failure, and end rank 0 while it writes. All that a rank leaves is written and closed by now.
    os._exit(status)


def _wait(processes: list) -> dict[int, int]:
    """Until all have ended; as soon as one has failed, the others are ended as well, by a signal that no rank takes
    for a request. Returns {rank: exit code} of those that failed by themselves."""
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            running.pop(sentinel).join()
        failed = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode}
        if failed:
            for process in running.values():
                process.kill()
                process.join()
            return failed
    return {}


def _explain(failed: dict[int, int], reports: Path) -> int:
    """Prints the failure that came first: the others only lost their connection to it."""
    for rank, exitcode in failed.items():
        if exitcode < 0 and exitcode != -signal.SIGTERM:
            name = signal.Signals(-exitcode).name
            hint = "; out of host memory is the usual cause" if name == "SIGKILL" else ""
            print(f"error: rank {rank} was ended by {name}{hint}", file=sys.stderr)
            return 1
    failures = [json.loads(p.read_text()) for p in reports.glob("*.json")]
    if not failures:
        print("error: a process was ended from outside", file=sys.stderr)
        return 1
    first = min(failures, key=lambda f: f["time"])
    if first["traceback"]:
        print(first["traceback"], file=sys.stderr, end="")
    print(f"error: rank {first['rank']}: {first['message']}", file=sys.stderr)
    return first["status"]
