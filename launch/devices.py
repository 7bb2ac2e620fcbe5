"""What the devices of this machine can do, and how a thread takes one."""

from __future__ import annotations

from functools import cache

import torch


@cache
def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton, and so torch.compile, supports this device: a GPU of compute capability 8.0 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def use(device: torch.device) -> None:
    """Makes it this thread's own. By a stream of another than the first GPU, which each thread begins with, the process
    would get a context on that one too: half a GiB of it, and a third of a second that holds the interpreter."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
