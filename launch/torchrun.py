"""Makes this process one of the ranks that torchrun has started.

Any other launcher that sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR works as well.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from launch.apart import TorchrunLauncher
from launch.nccl import explain_nccl_error
from launch.ranks import join_process_group, raise_file_limit, read_env_int
from options.errors import DONE, FAILED, UserError, describe, exit_status

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)  # for all ranks to arrive: the nodes of a job do not start at once
CHECK_TIMEOUT = timedelta(days=1)  # for checks that download a model


def run_as_rank(run: Callable, check: Callable, verbose: bool = False, preload: Sequence[str] = ()) -> int:
    """Check the run with all ranks, then run it as this rank; return 0. Collective.

    An error of the check that is a UserError is raised; any other error is printed and ends the process.

    Args:
        run: run(rank_info, job) trains; it is called in the run's process group.
        check: check(launcher) returns the job, in a group that uses no GPU. It raises UserError on all
            ranks or on none.
        verbose: print the traceback of every error.
        preload: modules that the launcher's ranks need.
    """
    rank, world, local_rank = (read_env_int(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # not for ranks started by hand, whose parent may end before them
        threading.Thread(target=_exit_with_agent, args=(os.getppid(),), daemon=True).start()
    checking = True
    raise_file_limit()
    try:
        # Each group needs its own prefix in the store: with a common one the second group would find the
        # addresses of the first, which are closed by then.
        store, started = rendezvous(rank, world)
        check_store = dist.PrefixStore("prepare", store)
        dist.init_process_group("gloo", store=check_store, rank=rank, world_size=world, timeout=CHECK_TIMEOUT)
        job = check(TorchrunLauncher(check_store, rank, world, local_rank, started, preload))
        dist.destroy_process_group()
        checking = False
        run(join_process_group(rank, world, local_rank, dist.PrefixStore("train", store)), job)
        dist.destroy_process_group()
        return DONE
    except Exception as e:
        if checking and isinstance(e, UserError):
            raise
        error = explain_nccl_error(e)
        if exit_status(error) == FAILED or verbose:
            traceback.print_exc()
        print(f"error: rank {rank}: {describe(error)}", file=sys.stderr, flush=True)
        os._exit(exit_status(error))


def rendezvous(rank: int, world: int) -> tuple[dist.Store, float]:
    """Wait for all ranks at MASTER_ADDR and MASTER_PORT; return (their store, the run's start). Collective.

    The start is rank 0's time.time() at the first start of the run; restarts do not change it. Raises
    UserError if not all ranks arrive within RENDEZVOUS_TIMEOUT.
    """
    address = f"{os.environ['MASTER_ADDR']}:{read_env_int('MASTER_PORT')}"
    if not 0 <= rank < world:
        raise UserError(f"RANK {rank}: must be below WORLD_SIZE {world}")
    arrived = 0
    try:
        shared, *_ = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
        store, agent_store = own_store(shared, rank), unwrap_store(shared)
        if rank == 0:  # its clock decides; set before it arrives, so that all ranks find it after the wait
            agent_store.compare_set("first start", "", str(time.time()))
        arrived = store.add("arrived", 1)
        if arrived == world:
            store.set("all arrived", "")
        store.wait(["all arrived"], RENDEZVOUS_TIMEOUT)
    except dist.DistError as e:
        if arrived:
            count, seconds = store.add("arrived", 0), RENDEZVOUS_TIMEOUT.seconds
            seen = f"only {count} of {world} ranks came within {seconds} s"
            raise UserError(f"{address}: {seen}; the other nodes' output says why") from None
        reason = str(e).splitlines()[0]
        cause = f"MASTER_ADDR, MASTER_PORT; {reason}"
        raise UserError(f"{address}: the ranks cannot meet here ({cause})") from None
    return store, float(agent_store.get("first start"))


def unwrap_store(shared: dist.Store) -> dist.Store:
    """Return the store under the key prefixes of `shared`: torchrun's own, the same after a restart.

    So it keeps the time that --max_minutes counts from over the restarts of --max-restarts.
    """
    while isinstance(shared, dist.PrefixStore):
        shared = shared.underlying_store
    return shared


def own_store(shared: dist.Store, rank: int) -> dist.Store:
    """Return a store that holds nothing of an earlier start of the ranks. Collective.

    torchrun's own store, `shared`, may survive a restart (--max-restarts) and then still holds the addresses
    of the ranks that are gone. So rank 0 serves a new store, and the others try the port written in `shared`
    until it is the new one's.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return shared
    host, deadline = os.environ["MASTER_ADDR"], time.monotonic() + dist.default_pg_timeout.total_seconds()
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        shared.set("port", str(store.port))
        return store
    while True:
        port = int(shared.get("port"))
        try:
            # Fails at once where a TCPStore client would retry for long.
            socket.create_connection((host, port), timeout=5).close()
            return dist.TCPStore(host, port, is_master=False)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _exit_with_agent(agent_pid: int) -> None:
    """Wait until torchrun's agent, the parent process, ends; then end this process. Runs in a thread.

    A killed agent cannot end its ranks. If it were started again, new ranks would write into the same folder.
    """
    while os.getppid() == agent_pid:
        time.sleep(0.5)
    print("error: torchrun has ended, and this rank with it", file=sys.stderr, flush=True)
    os._exit(FAILED)
