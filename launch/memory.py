"""What memory is in use, on the host and on a GPU, and its peaks; memory that is page-locked where there is so much.

What weights should take: monitoring/memory_model.py.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

GIB, MIB = 2**30, 2**20
STATM = Path("/proc/self/statm")  # sizes of this process in pages; the second is the resident one (Linux)


def size(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes > GIB else f"{n_bytes / MIB:.2f} MiB"


def host_bytes(model: nn.Module) -> int:
    """What this rank's weights take of host memory."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local if t.is_cpu}
    return sum(storages.values())


def in_use(device: torch.device) -> int:
    """Bytes that this process uses now: on a GPU those of its tensors, as torch's allocator counts them on the host,
    so nothing waits for the GPU; on a CPU its resident size."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if STATM.is_file():
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return largest_resident()


def largest_resident() -> int:
    """Bytes: the process's largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def can_pin(device_type: str) -> bool:
    """Whether there is page-locked host memory for a device of this type."""
    if device_type != "cuda":
        return False
    try:
        torch.empty(2**20, pin_memory=True)
    except RuntimeError:  # some containers and hosts limit locked memory
        return False
    return True


def empty_on_host(weight: torch.Tensor, device_type: str) -> torch.Tensor:
    """Like `weight`, a DTensor too, in host memory: pinned for a device of this type, where there is so much of it."""
    try:
        return torch.empty_like(weight, device="cpu", pin_memory=device_type == "cuda")
    except RuntimeError:
        return torch.empty_like(weight, device="cpu")


class Peaks:
    """The highest use of GPU memory in each phase of a run, and in each step. There is one, as there is one allocator
    with one set of counters in a process. Without a GPU it measures nothing."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.phase, self.step = "start", (0, 0)
        self.by_phase: dict[str, int] = {}

    def enter(self, phase: str) -> None:
        self._note()
        self.phase = phase

    def take(self) -> tuple[int, int]:
        """(allocated, reserved) bytes at the peak since the last call."""
        self._note()
        step, self.step = self.step, (0, 0)
        return step

    def _note(self) -> None:
        if not torch.cuda.is_initialized():
            return
        now = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        self.step = max(self.step[0], now[0]), max(self.step[1], now[1])
        self.by_phase[self.phase] = max(self.by_phase.get(self.phase, 0), now[0])


PEAKS = Peaks()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
