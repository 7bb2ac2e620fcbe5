"""Makes this process one of the ranks that torchrun has started.

Anything else that sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR will do as well.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from launch.ranks import join_group, number_in_environment
from options.errors import DONE, FAILED, UserError, describe, exit_status

MEETING = timedelta(minutes=5)  # for all ranks to come; the nodes of a job do not start at the same moment


PREPARING = timedelta(days=1)  # for checks that download a model


def join(run: Callable, prepare: Callable, verbose: bool = False) -> int:
    """Under torchrun: prepare(rank, world, local_rank, when the run began) on every rank, in a group that touches no
    GPU, then run(rank_info, what it returned). Returns the exit status. verbose: tracebacks with errors.

    A UserError of `prepare`, which raises it on all ranks or none, passes through.
    """
    rank, world, local_rank = (number_in_environment(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
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
        return DONE
    except Exception as e:
        if preparing and isinstance(e, UserError):
            raise
        if exit_status(e) == FAILED or verbose:
            traceback.print_exc()
        print(f"error: rank {rank}: {describe(e)}", file=sys.stderr, flush=True)
        os._exit(exit_status(e))


def meet(rank: int, world: int) -> tuple[dist.Store, float]:
    """(the store at MASTER_ADDR and MASTER_PORT, once all ranks have come to it; time.time() of rank 0 when the run first
    began). Raises UserError if they do not within MEETING."""
    where = f"{os.environ['MASTER_ADDR']}:{number_in_environment('MASTER_PORT')}"
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


def _end_with_agent(agent: int) -> None:
    """An agent that is killed cannot end its ranks; started again, it would have others in the same folder."""
    while os.getppid() == agent:
        time.sleep(0.5)
    print("error: torchrun has ended, and this rank with it", file=sys.stderr, flush=True)
    os._exit(FAILED)
