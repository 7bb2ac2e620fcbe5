"""Whether Triton runs on a device, and which device a thread works on."""

from __future__ import annotations

from functools import cache

import torch


@cache
def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton, and so torch.compile, supports this device: a GPU of compute capability 8.0 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def use(device: torch.device) -> None:
    """Makes the device this thread's current one. A thread begins with the first GPU: with a stream of
    another it would open a context on the first one as well, which takes half a GiB there and holds the
    interpreter for a third of a second."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
