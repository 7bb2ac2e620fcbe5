"""Starts one process per rank. When one fails, ends the others and prints the error of the one that failed.

Under torchrun this process already is a rank: launch/torchrun.py. launch/start.py chooses between the two.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing.connection
import multiprocessing.forkserver
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launch.failures import Failure, first_failure
from launch.nccl import explain_nccl_error
from launch.program import prepare_environment, prepare_long_run
from launch.ranks import join_process_group
from launch.signals import forwarding_signals, unblock_signals
from launch.stored_arguments import StoredArguments
from options.errors import DONE, FAILED, UserError, describe, exit_status

POLL_SECONDS = 0.5  # between looks at the ranks of other launchers


def check_address(address: str, port: int | None) -> None:
    """Raise UserError unless ranks on this machine can meet at --master_addr and --master_port."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, where in found[:1]:
            with socket.socket(family, kind, protocol) as s:
                s.bind((where[0], 0))
    except (OSError, UnicodeError) as e:  # UnicodeError: not a valid host name
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
    """Run run(rank_info, *args) in `world` new processes, wait for them, and return the exit status.

    If a rank fails, the others are killed and its message is printed: `error: rank 1: ...`. The traceback
    comes before that line, unless the user can fix the error from the message alone.

    Args:
        run: the function of a rank; picklable, so at the top level of a module.
        world: number of ranks.
        args: picklable arguments of `run`. Their tensors become mappings of a file (StoredArguments).
        address, port: of rank 0. port None = a free one.
        verbose: print the traceback of every error.
        preload: modules that ranks need; the server that ranks are forked from imports them once.

    Returns:
        0; 2 for an error that the user can fix, 1 for any other; 128 + a signal that ended the run.

    Raises UserError if the folder of temporary files cannot take the arguments.
    """
    set_meeting_point(address, port)
    failure = run_ranks(run, RankRange(world, world), args, preload=preload)
    return failure.print(verbose) if failure else DONE


def set_meeting_point(address: str, port: int | None) -> None:
    """Set where new ranks find rank 0, in this process's environment. port: None = a free one."""
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port or find_free_port())}
    if address in ("localhost", "127.0.0.1") and Path("/sys/class/net/lo").exists():
        # Otherwise gloo looks up the host's own name, which fails on machines without a DNS entry.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@dataclass(frozen=True)
class RankRange:
    """The ranks that a process starts: by default all of them.

    Attributes:
        world: number of all ranks.
        count: number of ranks to start.
        first, first_local: number of the first one, among all ranks and within its node.
    """

    world: int
    count: int
    first: int = 0
    first_local: int = 0


def run_ranks(
    run: Callable,
    ranks: RankRange,
    args: tuple,
    environment: dict[str, str] | None = None,
    preload: Sequence[str] = (),
    failed_elsewhere: Callable[[], bool] | None = None,
) -> Failure | None:
    """Run run(rank_info, *args) in new processes, wait for them, and return how they failed, or None.

    Args:
        run, args, preload: as for `start`.
        ranks: the ranks to start.
        environment: of the ranks; None = this process's.
        failed_elsewhere: whether a rank of another launcher has failed, so that these must end. They are not
            reported then.

    Raises UserError if the folder of temporary files cannot take the arguments.
    """
    prepare_environment()  # for programs that have not called it themselves
    # A killed rank leaves its locks behind. The resource tracker would warn about them after our error line.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    with tempfile.TemporaryDirectory() as reports, StoredArguments(args) as stored:
        rank_args = (dict(environment or os.environ), run, ranks, stored, reports)
        # Signals stay blocked in a new process until `_rank_process` unblocks them: Python answers a SIGINT
        # during imports with a traceback. The fork server never unblocks them; it ends after this process and
        # the ranks.
        try:
            with forwarding_signals(lambda: _start_ranks(ranks.count, rank_args, preload)) as (
                received,
                processes,
            ):
                failed = _wait_for_ranks(processes, failed_elsewhere)
        except StartError as e:
            return Failure(FAILED, f"error: {e}")
        # A rank that the signal killed writes no report. One that failed to save while it stopped does.
        if failed and received.stop and (min(failed.values()) < 0 or not any(Path(reports).iterdir())):
            return Failure(128 + received.stop, f"ended by {received.stop.name}")
        return first_failure(failed, ranks.first, Path(reports)) if failed else None


class StartError(Exception):
    """The ranks cannot be started. The text is the reason."""


def _start_ranks(count: int, args: tuple, preload: Sequence[str] = ()) -> list:
    """Start `count` processes that run _rank_process(index, *args), and return them in the order of ranks.

    On Linux without GPUs they are forks of a server that has imported `preload`, which saves seconds.
    Otherwise they are spawned: neither the state of a GPU's driver nor Apple's libraries survive a fork.

    Raises StartError if the server or a process ends while it starts.
    """
    other_children = mp.active_children()
    method = "spawn" if torch.cuda.is_available() or sys.platform != "linux" else "forkserver"
    if method == "forkserver":
        multiprocessing.forkserver.set_forkserver_preload(["launch.fork_server", *preload])
        with contextlib.chdir(Path(__file__).parents[1]):  # so that the server can import these modules
            multiprocessing.forkserver.ensure_running()
    try:
        context = mp.start_processes(_rank_process, args, nprocs=count, join=False, start_method=method)
    except BaseException as e:
        # Ranks that have started would wait for the others.
        for process in set(mp.active_children()).difference(other_children):
            process.kill()
        if isinstance(e, EOFError | ConnectionError):
            cause = "out of host memory is the usual cause"
            raise StartError(f"a process ended while it imported what ranks need; {cause}") from e
        raise
    return context.processes


def find_free_port() -> int:
    """Return a TCP port of localhost that is free now."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _exit_with_parent() -> None:
    """Wait until the launching process ends, then end this process with status FAILED. Runs in a thread.

    torch's own way cannot be used: it sends SIGINT when the parent dies, which a training rank takes for a
    request to stop, and the parent of a forked rank is the fork server.
    """
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(FAILED)


def _rank_process(
    index: int, environment: dict[str, str], run: Callable, ranks: RankRange, stored: Any, reports: str
) -> None:
    """Run a rank in this new process: join the group, call `run`, report a failure, end the process.

    It does not return.

    Args:
        index: this rank among those that the launching process starts.
        environment: the variables of this process's environment.
        ranks: the ranks that the launching process starts.
        run, stored: run(rank_info, *args) is called with the stored arguments (StoredArguments).
        reports: folder for <rank>.json, which is written if the rank fails.
    """
    gc.freeze()
    gc.enable()  # off in the fork server
    rank = ranks.first + index
    os.environ.clear()  # the fork server's, which may be older
    os.environ |= environment
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    prepare_long_run()
    unblock_signals()
    status = DONE
    try:
        args = stored.load()
        run(join_process_group(rank, ranks.world, ranks.first_local + index), *args)
        dist.destroy_process_group()
    except Exception as e:  # any: the launcher prints it and ends the other ranks
        error = explain_nccl_error(e)
        status = exit_status(error)
        report = {"time": time.time(), "rank": rank, "status": status, "message": describe(error)}
        report["traceback"] = traceback.format_exc()
        try:
            (Path(reports) / f"{rank}.tmp").write_text(json.dumps(report))
            (Path(reports) / f"{rank}.tmp").rename(Path(reports) / f"{rank}.json")
        except OSError:  # temporary files may be on the disk that is full
            print(f"error: rank {rank}: {report['message']}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Exit at once. After a failure an ordinary exit waits for collectives that can no longer end. After a
    # success it unloads libraries while their threads run, which has raised SIGABRT: the launcher would take
    # that for a failure and kill rank 0 while it writes. All files of this rank are written and closed by
    # now.
    os._exit(status)


def _wait_for_ranks(processes: list, failed_elsewhere: Callable[[], bool] | None = None) -> dict[int, int]:
    """Wait for all ranks, and kill the others once some fail; return {index: exit code} of those that failed.

    SIGKILL is used because a rank takes other signals for requests. The ranks killed here are not returned.
    failed_elsewhere: as for `run_ranks`.
    """
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in multiprocessing.connection.wait(
            list(running), POLL_SECONDS if failed_elsewhere else None
        ):
            running.pop(sentinel).join()
        failed = {index: p.exitcode for index, p in enumerate(processes) if p.exitcode}
        if failed or (failed_elsewhere and failed_elsewhere()):
            for process in running.values():
                process.kill()
                process.join()
            return failed
    return {}
