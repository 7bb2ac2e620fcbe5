"""The device of a program of one process, what devices support, and a thread's current device."""

from __future__ import annotations

from functools import cache

import torch

# Compute capabilities with a kernel of torch._grouped_mm. On other GPUs it loops, and the host waits; there
# quantization/grouped_kernel.py takes its place.
GROUPED_CAPABILITIES = (9, 10)
# Those of them whose kernel leaves arbitrary numbers in the product of a group without rows: the gradient of
# an idle expert's weight (pytorch#172439, NVIDIA/cutlass#2674).
UNFILLED_CAPABILITIES = (10,)


@cache
def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton, and so torch.compile, supports this device: a GPU of compute capability 8.0 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def grouped_matmul_runs_on(device: torch.device) -> bool:
    """Whether torch has a kernel that multiplies groups of rows with a matrix each, on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in GROUPED_CAPABILITIES


@cache
def grouped_matmul_fills_all(device: torch.device) -> bool:
    """Whether that kernel writes zeros as the gradient of the weight of a group without rows."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in UNFILLED_CAPABILITIES


def choose_device(name: str | None = None) -> torch.device:
    """Return the device of a program of one process.

    A GPU always has its index: "cuda" alone is each thread's current GPU, and is unequal to "cuda:0".

    Args:
        name: cpu, cuda (the current GPU) or cuda:N; None = a GPU if there is one.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def set_current_device(device: torch.device) -> None:
    """Make a GPU the current device of this thread; do nothing for a CPU. The GPU needs its index.

    A new thread starts on GPU 0. If it used a stream of another GPU, it would also open a context on GPU 0,
    which takes 0.5 GiB there and holds the interpreter lock for a third of a second.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
