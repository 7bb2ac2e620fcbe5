"""Starts one process per GPU (or CPU rank), and ends all of them when one fails, with that one's message.

Two ways in, one way through: `start` spawns the processes itself; under torchrun (or anything else that
sets RANK, WORLD_SIZE and LOCAL_RANK) this process already is one of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing.connection
import multiprocessing.forkserver
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
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launch.program import outlast, prepare_environment, under_torchrun
from launch.signals import forwarding, hear
from options.errors import UserError, describe, needs_no_traceback

MEETING = timedelta(minutes=5)  # for all ranks to come; the nodes of a job do not start at the same moment
CPU_RANKS = 16  # on any machine, for trying things out; more only where there are processors for them
PREPARING = timedelta(days=1)  # for checks that download a model


@dataclass(frozen=True)
class Place:
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
        world = _number("WORLD_SIZE")
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


def use(device: torch.device) -> None:
    """Makes it this thread's own. By a stream of another than the first GPU, which each thread begins with, the process
    would get a context on that one too: half a GiB of it, and a third of a second that holds the interpreter."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


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
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        use(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **where)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", **where)
    processors = share_of_processors(local_rank, rank, local_world, world)
    set_threads(processors, local_world)
    return Place(rank, world, local_rank, local_world, device, processors)


def check_address(address: str, port: int | None) -> None:
    """Raises UserError unless ranks that are started here could meet at --master_addr and --master_port."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, where in found[:1]:
            with socket.socket(family, kind, protocol) as s:
                s.bind((where[0], 0))
    except (OSError, UnicodeError) as e:  # UnicodeError: no name of a host
        reason = getattr(e, "strerror", None) or "not a host's name"
        raise UserError(f"--master_addr {address}: is no address of this machine ({reason})") from None
    if port is None:
        return
    try:
        with socket.create_server(("", port), reuse_port=False):
            pass
    except OSError as e:
        raise UserError(
            f"--master_port {port}: cannot be used ({os.strerror(e.errno)}); leave it out for a free one"
        ) from None


def start(
    run: Callable, world: int, args: tuple, address: str, port: int | None, verbose: bool = False
) -> int:
    """Runs run(place, *args) in `world` new processes and waits. Returns the exit status to end with.

    If one fails, the others are ended at once and its message is printed: `error: rank 1: ...`; above it its traceback,
    if the message does not say all, or with verbose.
    """
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port or free_port())}
    if address in ("localhost", "127.0.0.1") and Path("/sys/class/net/lo").exists():
        # Otherwise gloo looks up the host's own name, which fails on machines without a DNS entry.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    prepare_environment()  # of a program that has not by itself
    # A rank that is ended at once cannot put away its locks; the clean-up's warning would follow the error.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    with tempfile.TemporaryDirectory() as reports:
        given = (dict(os.environ), run, world, args, reports)
        # The signals that end a rank wait until it is one of ours: Python's own answer to SIGINT, while it imports what
        # a rank needs, is a traceback. A server of forks never hears them, and ends when this process and the ranks have.
        try:
            with forwarding(lambda: _start_ranks(world, given)) as (received, processes):
                failed = _wait(processes)
        except NotStarted as e:
            print(f"error: {e}", file=sys.stderr)
            return 1
        # Those that it ended have nothing to say; one that failed while it stopped, as it could not save, has.
        if failed and received.stop and (min(failed.values()) < 0 or not any(Path(reports).iterdir())):
            print(f"ended by {received.stop.name}", file=sys.stderr)
            return 128 + received.stop
        return _explain(failed, Path(reports), verbose) if failed else 0


class NotStarted(Exception):
    """Ranks that cannot be started, and why."""


def _start_ranks(world: int, args: tuple) -> list:
    """New processes of _rank_process(rank, *args), in order. Without GPUs they are forks of a server that has imported
    what takes each of them seconds. What a GPU's driver has set up does not outlive a fork, nor do Apple's libraries.
    Raises NotStarted if the server or one of them has ended before it was there, or has no room for the rows."""
    others = mp.active_children()
    method = "spawn" if torch.cuda.is_available() or sys.platform != "linux" else "forkserver"
    if method == "forkserver":
        multiprocessing.forkserver.set_forkserver_preload(["launch.rank_imports"])
        with contextlib.chdir(Path(__file__).parents[1]):  # where it finds that
            multiprocessing.forkserver.ensure_running()
    try:
        context = mp.start_processes(_rank_process, args, nprocs=world, join=False, start_method=method)
    except BaseException as e:
        for process in set(mp.active_children()).difference(others):  # they would wait for the rest
            process.kill()
        if isinstance(e, EOFError | ConnectionError):
            reason = (
                "a process ended while it imported what ranks need; out of host memory is the usual cause"
            )
            raise NotStarted(reason) from e
        if isinstance(e, RuntimeError) and "shared memory" in str(e):
            told = "the data goes to the ranks through shared memory, which is full; docker run has --shm-size for it"
            raise NotStarted(f"{told} ({describe(e)})") from e
        raise
    return context.processes


def join(run: Callable, prepare: Callable, verbose: bool = False) -> int:
    """Under torchrun: prepare(rank, world, local_rank, when the run began) on every rank, in a group that touches no
    GPU, then run(place, what it returned). Returns the exit status. verbose: as of `start`.

    A UserError of `prepare`, which raises it on all ranks or none, passes through.
    """
    rank, world, local_rank = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # not where somebody starts each rank by hand, and leaves
        threading.Thread(target=_end_with_agent, args=(os.getppid(),), daemon=True).start()
    preparing = True
    try:
        # Each group has its own part of the store: in a common one the second would find the addresses of the
        # first, already closed.
        store, began = meet(rank, world)
        first = dist.PrefixStore("prepare", store)
        dist.init_process_group("gloo", store=first, rank=rank, world_size=world, timeout=PREPARING)
        prepared = prepare(rank, world, local_rank, began)
        dist.destroy_process_group()
        preparing = False
        run(join_group(rank, world, local_rank, dist.PrefixStore("train", store)), prepared)
        dist.destroy_process_group()
        return 0
    except Exception as e:
        known = needs_no_traceback(e)
        if preparing and isinstance(e, UserError):
            raise
        if not known or verbose:
            traceback.print_exc()
        print(f"error: rank {rank}: {describe(e)}", file=sys.stderr, flush=True)
        os._exit(2 if known else 1)


def meet(rank: int, world: int) -> tuple[dist.Store, float]:
    """(the store at MASTER_ADDR and MASTER_PORT, once all ranks have come to it; time.time() of rank 0 when the run first
    began). Raises UserError if they do not within MEETING."""
    where = f"{os.environ['MASTER_ADDR']}:{_number('MASTER_PORT')}"
    if not 0 <= rank < world:
        raise UserError(f"RANK {rank}: must be below WORLD_SIZE {world}")
    came = 0
    try:
        shared, *_ = next(dist.rendezvous("env://", timeout=MEETING))
        store, lasting = own_store(shared, rank), lasting_store(shared)
        if rank == 0:  # whose clock decides; before it has come, so that all find it once all have
            lasting.compare_set("first start", "", str(time.time()))
        came = store.add("came", 1)
        if came == world:
            store.set("all came", "")
        store.wait(["all came"], MEETING)
    except dist.DistError as e:
        if came:
            seen = f"only {store.add('came', 0)} of {world} ranks came within {MEETING.seconds} s"
            raise UserError(f"{where}: {seen}; the other nodes' output says why") from None
        reason = str(e).splitlines()[0]
        raise UserError(f"{where}: the ranks cannot meet here (MASTER_ADDR, MASTER_PORT; {reason})") from None
    return store, float(lasting.get("first start"))


def lasting_store(shared: dist.Store) -> dist.Store:
    """torchrun's own, of which `shared` may be this start's part. It remembers over the starts of --max-restarts: a limit
    of time is one of them all."""
    while isinstance(shared, dist.PrefixStore):
        shared = shared.underlying_store
    return shared


def _number(name: str) -> int:
    """A whole number in the environment. Raises UserError."""
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment: not a whole number; torchrun sets it")
    return int(text)


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
    """torch's own way, a SIGINT when the parent dies, is a request to a rank that trains; and the parent of a fork is its
    server."""
    mp.parent_process().join()
    os._exit(1)


def _end_with_agent(agent: int) -> None:
    """An agent that is killed cannot end its ranks; started again, it would have others in the same folder."""
    while os.getppid() == agent:
        time.sleep(0.5)
    print("error: torchrun has ended, and this rank with it", file=sys.stderr, flush=True)
    os._exit(1)


def _rank_process(
    rank: int, environment: dict[str, str], run: Callable, world: int, args: tuple, reports: str
) -> None:
    os.environ.clear()  # of the server, which may be older
    os.environ |= environment
    threading.Thread(target=_end_with_parent, daemon=True).start()
    outlast()
    hear()
    status = 0
    try:
        run(join_group(rank, world, rank), *args)
        dist.destroy_process_group()
    except Exception as e:  # of any kind: the parent tells it, and ends the others
        status = 2 if needs_no_traceback(e) else 1
        report = {"time": time.time(), "rank": rank, "status": status, "message": describe(e)}
        report["traceback"] = traceback.format_exc()
        try:
            (Path(reports) / f"{rank}.tmp").write_text(json.dumps(report))
            (Path(reports) / f"{rank}.tmp").rename(Path(reports) / f"{rank}.json")
        except OSError:  # the disk that is full is also that of temporary files
            print(f"error: rank {rank}: {report['message']}", file=sys.stderr)
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


def _explain(failed: dict[int, int], reports: Path, verbose: bool) -> int:
    """Prints the failure that came first: the others only lost their connection to it."""
    for rank, exitcode in failed.items():
        if exitcode < 0 and exitcode != -signal.SIGTERM:
            name = signal.Signals(-exitcode).name
            hint = "; out of host memory is the usual cause" if name == "SIGKILL" else ""
            print(f"error: rank {rank} was ended by {name}{hint}", file=sys.stderr)
            return 1
    failures = [json.loads(p.read_text()) for p in reports.glob("*.json")]
    if not failures:
        if 2 in failed.values():  # which has told it itself
            return 2
        print("error: a process was ended from outside", file=sys.stderr)
        return 1
    first = min(failures, key=lambda f: f["time"])
    if first["status"] == 1 or verbose:
        print(first["traceback"], file=sys.stderr, end="")
    print(f"error: rank {first['rank']}: {first['message']}", file=sys.stderr)
    return first["status"]
