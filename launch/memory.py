"""Memory in use on the host and on a GPU, its peaks, and page-locked host memory.

monitoring/memory_model.py computes the memory that weights are expected to take.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
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


def gpu_room(device: torch.device) -> float:
    """Return the bytes that this process's tensors may take of a GPU: all that is free, or that torch holds.

    A limit of torch's allocator (torch.cuda.set_per_process_memory_fraction) may lower it.
    """
    free, total = torch.cuda.mem_get_info(device)
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return min(free + torch.cuda.memory_reserved(device), limit)


def peak_resident_bytes() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


@contextmanager
def try_page_locking(sizes: Iterable[int]) -> Iterator[bool]:
    """Yield whether the host allows page-locked buffers of these sizes, in bytes, at the same time.

    They are held within the context, and freed after it. A small trial would not tell: WSL2 and some
    containers refuse what exceeds a limit.
    """
    held: list[torch.Tensor] = []
    try:
        held += (torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes)
        allowed = True
    except RuntimeError:
        report_refusal()
        allowed = False
    try:
        yield allowed
    finally:
        held.clear()
        release_page_locked()


def release_page_locked() -> None:
    """Give freed page-locked memory back to the system; torch would keep it for later requests of its own."""
    # The first is torch's public name for it, the second that of older versions.
    release = getattr(torch.accelerator, "empty_host_cache", None) or getattr(
        torch._C, "_host_emptyCache", None
    )
    if release and torch.cuda.is_initialized():
        release()


def empty_on_host(weight: torch.Tensor, device_type: str) -> torch.Tensor:
    """Return an uninitialized host tensor of the shape and dtype of `weight`, and a DTensor if that is one.

    It is page-locked if device_type is "cuda" and the host allows that much locked memory.
    """
    if device_type == "cuda":
        try:
            return torch.empty_like(weight, device="cpu", pin_memory=True)
        except RuntimeError:
            report_refusal()
    return torch.empty_like(weight, device="cpu")


def page_locked_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a host tensor to page-locked memory; return the tensor itself if the host refuses that."""
    try:
        return tensor.pin_memory()
    except RuntimeError:
        report_refusal()
        return tensor


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start to copy a tensor to the host; from a GPU, asynchronously if page-locked memory is allowed.

    torch's own `to` raises an error if it is not.
    """
    return empty_on_host(tensor, tensor.device.type).copy_(tensor, non_blocking=True)


@cache
def report_refusal() -> None:
    """Print, once and on rank 0, that the host refuses page-locked memory."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(
            "memory: the host refuses page-locked memory, all or beyond a limit (WSL2 and some containers"
            " have one): copies between host and GPU are slower, results are the same",
            flush=True,
        )


class PeakMemory:
    """Peak GPU memory of each phase of a run and of each step. Measures nothing without a GPU.

    Use the one instance PEAK_MEMORY: torch's allocator has one set of counters in a process.

    Attributes:
        uncounted: bytes in use that torch's allocator counts as free: those of CUDA graphs between replays.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget the recorded peaks and graphs, and count from here on for the phase "start"."""
        self.uncounted = 0
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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing meanwhile: what is allocated here is in memory that is counted already."""
        self._read_counters()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()

    def _read_counters(self) -> None:
        """Raise the peaks of the phase and of the step to the allocator's, and reset the allocator's."""
        if not torch.cuda.is_initialized():
            return
        now = torch.cuda.max_memory_allocated() + self.uncounted, torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        self.step = max(self.step[0], now[0]), max(self.step[1], now[1])
        self.by_phase[self.phase] = max(self.by_phase.get(self.phase, 0), now[0])


PEAK_MEMORY = PeakMemory()


def gpu_bytes_allocated() -> int:
    """Return the bytes of this process's tensors on the current GPU; 0 without a GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that a GPU is out of memory: the allocator's, or another library's.

    NCCL writes "Cuda failure 2 'out of memory'".
    """
    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search("(CUDA|Cuda).*out of memory|CU(BLAS|DNN)_STATUS_ALLOC", str(error))
    )
