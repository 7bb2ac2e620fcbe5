"""NCCL on hosts that it does not suit: links between GPUs that hang, and a /dev/shm that is too small."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from options.errors import UserError

SILENCE_SECONDS = 60  # from the start of the group; GPUs that reach one another answer within seconds


@contextmanager
def tell_of_silence(local_rank: int, local_world: int) -> Iterator[None]:
    """Within the context, wait for the node's other GPUs; if that takes long, print what may help.

    The wait goes on: torch ends it at its own timeout. Nothing is printed if the user has set the variable.
    """
    if local_rank or local_world < 2 or "NCCL_P2P_DISABLE" in os.environ:
        yield
        return
    line = (
        f"the {local_world} GPUs have not reached one another within {SILENCE_SECONDS} s, still waiting; some"
        " machines hang in copies from GPU to GPU (two RTX 4090, virtual machines): if this goes on, stop the"
        " run and start it with NCCL_P2P_DISABLE=1 in the environment"
    )
    timer = threading.Timer(SILENCE_SECONDS, print, [line], {"flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def reach_gpus(device: torch.device) -> None:
    """Sum a number over the GPUs of all ranks, and wait for it. Collective.

    Links that hang do so here, before anything is loaded.
    """
    dist.all_reduce(torch.ones((), device=device))
    torch.cuda.synchronize(device)


def explain_nccl_error(error: Exception) -> Exception:
    """Return a UserError that says what helps if NCCL got no shared memory; otherwise the error itself."""
    text = " ".join(str(error).split())
    begin = text.find("Error while creating shared memory")
    if begin < 0 or not isinstance(error, dist.DistError):
        return error
    return UserError(
        "NCCL gets no shared memory, usually because /dev/shm is too small: set NCCL_SHM_DISABLE=1 in the"
        f" environment, or give a container more (docker run --shm-size=1g); {text[begin:]}"
    )
