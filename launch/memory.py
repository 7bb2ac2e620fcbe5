"""Memory in use on the host and on a GPU, its peaks, and page-locked host memory.

monitoring/memory_model.py computes the memory that weights are expected to take.
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


def format_bytes(n_bytes: float) -> str:
    """Return a number of bytes as text with two decimals: in GiB if above one, else in MiB."""
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes > GIB else f"{n_bytes / MIB:.2f} MiB"


def host_weight_bytes(model: nn.Module) -> int:
    """Return the bytes of host memory that this rank's shards of the parameters take, shared ones once."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local if t.is_cpu}
    return sum(storages.values())


def bytes_in_use(device: torch.device) -> int:
    """Return the bytes of this process's tensors on a GPU; for a CPU, the resident size of the process.

    It does not wait for the GPU: torch's allocator counts on the host.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if STATM.is_file():
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def can_pin(device_type: str) -> bool:
    """Whether `device_type` is "cuda" and this process may allocate page-locked host memory (tries it)."""
    if device_type != "cuda":
        return False
    try:
        torch.empty(2**20, pin_memory=True)
    except RuntimeError:  # some containers and hosts limit locked memory
        return False
    return True


def empty_on_host(weight: torch.Tensor, device_type: str) -> torch.Tensor:
    """Return an uninitialized host tensor of the shape and dtype of `weight`, and a DTensor if that is one.

    It is page-locked if device_type is "cuda" and the host allows that much locked memory.
    """
    try:
        return torch.empty_like(weight, device="cpu", pin_memory=device_type == "cuda")
    except RuntimeError:
        return torch.empty_like(weight, device="cpu")


class PeakMemory:
    """Peak GPU memory of each phase of a run and of each step. Measures nothing without a GPU.

    Use the one instance PEAK_MEMORY: torch's allocator has one set of counters in a process.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget the recorded peaks, and count from here on for the phase "start"."""
        self.phase, self.step = "start", (0, 0)
        self.by_phase: dict[str, int] = {}  # most bytes allocated in each phase

    def enter_phase(self, phase: str) -> None:
        """Count peaks from here on for this phase."""
        self._read_counters()
        self.phase = phase

    def pop_step_peak(self) -> tuple[int, int]:
        """Return the peak (allocated, reserved) bytes since the last call; (0, 0) without a GPU."""
        self._read_counters()
        step, self.step = self.step, (0, 0)
        return step

    def _read_counters(self) -> None:
        """Raise the peaks of the phase and of the step to the allocator's, and reset the allocator's."""
        if not torch.cuda.is_initialized():
            return
        now = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        self.step = max(self.step[0], now[0]), max(self.step[1], now[1])
        self.by_phase[self.phase] = max(self.by_phase.get(self.phase, 0), now[0])


PEAK_MEMORY = PeakMemory()


def gpu_bytes_allocated() -> int:
    """Return the bytes of this process's tensors on the current GPU; 0 without a GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
