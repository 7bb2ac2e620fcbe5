"""A machine to plan for, and whether a run fits it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launch.gpus import Gpu
from launch.memory import GIB
from monitoring.memory_model import MemoryEstimate

# GiB of each GPU that torch's allocator does not have: CUDA's context takes 0.5 (launch/devices.py); NCCL's
# buffers, cuBLAS's workspaces and what fragmentation wastes take the rest.
RESERVED_GIB = 1.0
CPUS_PER_RANK = 4  # where the machine's are not known
MOST_COMPILERS = 32  # of a rank: torch's default starts no more


@dataclass(frozen=True)
class Machine:
    """GPUs of one host.

    Attributes:
        gpu: their kind.
        gpus: their number.
        gib: memory of each, as torch reports it.
        host_gib: host memory; None = not known, and not judged.
        cpus: CPUs of the host; None = not known.
    """

    gpu: Gpu
    gpus: int
    gib: float
    host_gib: float | None = None
    cpus: int | None = None

    def __str__(self) -> str:
        """Return it as text: 2 x RTX 4090, 23.5 GiB each."""
        host = "" if self.host_gib is None else f", {self.host_gib:.1f} GiB of host memory"
        return f"{self.gpus} x {self.gpu.name}, {self.gib:.1f} GiB{' each' * (self.gpus > 1)}{host}"

    @property
    def usable_gib(self) -> float:
        """GiB of each GPU that a run's tensors may take."""
        return self.gib - RESERVED_GIB


def share_cpus(cpus: int | None, ranks: int) -> int:
    """Return how many processes compile for each of the ranks that share a host's CPUs. None = not known."""
    return CPUS_PER_RANK if cpus is None else min(max(cpus // ranks, 1), MOST_COMPILERS)


def fits(estimate: MemoryEstimate, machine: Machine) -> bool:
    """Return whether a run of that estimate fits the machine's GPUs and, where it is known, its host."""
    on_host = machine.host_gib is None or estimate.host <= machine.host_gib * GIB
    return on_host and estimate.peak <= machine.usable_gib * GIB


def find_largest(low: int, high: int, is_possible: Callable[[int], bool]) -> int:
    """Return the largest number from low to high that is possible, or 0.

    All numbers below a possible one must be possible.
    """
    if low > high or not is_possible(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_possible(middle) else (low, middle - 1)
    return low
