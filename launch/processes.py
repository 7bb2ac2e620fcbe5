"""Starts one process per GPU (or CPU rank), and ends all of them when one fails, with that one's message.

Under torchrun this process is a rank already: launch/torchrun.py. launch/start.py chooses.
"""

from __future__ import annotations

import contextlib
import gc
import json
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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launch.program import prepare_environment, survive_full_disk
from launch.ranks import join_group
from launch.signals import forwarding_signals, unblock_signals
from options.errors import DONE, FAILED, REFUSED, UserError, describe, exit_status


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
            f"--master_port {port}: cannot be used ({os.strerror(e.errno or 0)}); leave it out for a free one"
        ) from None


def start(
    run: Callable,
    world: int,
    args: tuple,
    address: str,
    port: int | None,
    verbose: bool = False,
    preload: Sequence[str] = (),
) -> int:
    """Runs run(rank_info, *args) in `world` new processes and waits. Returns the exit status to end with.

    address, port: of rank 0, None = a free one; preload: modules that the ranks import, for the server of forks. If one
    fails, the others are ended at once and its message is printed: `error: rank 1: ...`; above it its traceback, if the
    message does not say all, or with verbose.
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
            with forwarding_signals(lambda: _start_ranks(world, given, preload)) as (received, processes):
                failed = _wait(processes)
        except NotStarted as e:
            print(f"error: {e}", file=sys.stderr)
            return FAILED
        # Those that it ended have nothing to say; one that failed while it stopped, as it could not save, has.
        if failed and received.stop and (min(failed.values()) < 0 or not any(Path(reports).iterdir())):
            print(f"ended by {received.stop.name}", file=sys.stderr)
            return 128 + received.stop
        return _explain(failed, Path(reports), verbose) if failed else 0


class NotStarted(Exception):
    """Ranks that cannot be started, and why."""


def _start_ranks(world: int, args: tuple, preload: Sequence[str] = ()) -> list:
    """New processes of _rank_process(rank, *args), in order. Without GPUs they are forks of a server that has imported
    `preload`, which takes seconds. What a GPU's driver has set up does not outlive a fork, nor do Apple's libraries.
    Raises NotStarted if the server or one of them has ended before it was there, or has no room for the rows."""
    others = mp.active_children()
    method = "spawn" if torch.cuda.is_available() or sys.platform != "linux" else "forkserver"
    if method == "forkserver":
        multiprocessing.forkserver.set_forkserver_preload(["launch.fork_server", *preload])
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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _end_with_parent() -> None:
    """torch's own way, a SIGINT when the parent dies, is a request to a rank that trains; and the parent of a fork is its
    server."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(FAILED)


def _rank_process(
    rank: int, environment: dict[str, str], run: Callable, world: int, args: tuple, reports: str
) -> None:
    gc.freeze()
    gc.enable()  # off in the server of forks
    os.environ.clear()  # of the server, which may be older
    os.environ |= environment
    threading.Thread(target=_end_with_parent, daemon=True).start()
    survive_full_disk()
    unblock_signals()
    status = DONE
    try:
        run(join_group(rank, world, rank), *args)
        dist.destroy_process_group()
    except Exception as e:  # of any kind: the parent tells it, and ends the others
        status = exit_status(e)
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
            return FAILED
    failures = [json.loads(p.read_text()) for p in reports.glob("*.json")]
    if not failures:
        if REFUSED in failed.values():  # which has told it itself
            return REFUSED
        print("error: a process was ended from outside", file=sys.stderr)
        return FAILED
    first = min(failures, key=lambda f: f["time"])
    if first["status"] == FAILED or verbose:
        print(first["traceback"], file=sys.stderr, end="")
    print(f"error: rank {first['rank']}: {first['message']}", file=sys.stderr)
    return first["status"]
