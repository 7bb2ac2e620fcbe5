"""What a model's weights take, from the arithmetic of their shapes, and whether that is what they took.

The figure is checked at the start of every run: a weight that is not sharded, a copy that is not freed or a
dtype that is not the intended one shows here, before it shows as an out-of-memory error hours later.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

GIB, MIB = 2**30, 2**20
STATM = Path("/proc/self/statm")  # sizes of this process in pages; the second is the resident one (Linux)
TOLERANCE = 0.03
PER_TENSOR = 1024  # bytes: what an allocator may round one tensor up by


@dataclass(frozen=True)
class WeightBytes:
    """Of a whole model, by kind. unquantized: embedding, head, norms and what else is neither packed nor
    trained; trained: adapters, new blocks, or everything."""

    codes: int = 0
    scales: int = 0
    unquantized: int = 0
    trained: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    def __str__(self) -> str:
        parts = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}
        return " + ".join(f"{name} {size(n)}" for name, n in parts.items())


def size(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes > GIB else f"{n_bytes / MIB:.2f} MiB"


def weight_bytes(model: nn.Module) -> WeightBytes:
    """Of a model on any device, also meta, sharded or not; a tied weight counts once."""
    sizes = dict.fromkeys((f.name for f in fields(WeightBytes)), 0)
    for name, param in model.named_parameters():
        last = name.rpartition(".")[2]
        kind = "trained" if param.requires_grad else last if last in ("codes", "scales") else "unquantized"
        sizes[kind] += param.numel() * param.element_size()
    return WeightBytes(**sizes)


def rank_bytes(model: nn.Module) -> int:
    """Of this rank's shards, by FSDP's rule: dimension 0 in equal parts, of which the last may be shorter, or
    empty."""
    return sum(_rows(p) * (p.numel() // max(p.shape[0], 1)) * p.element_size() for p in model.parameters())


def _rows(param: nn.Parameter) -> int:
    if not isinstance(param, DTensor):
        return param.shape[0]
    rows = param.shape[0]
    for i, placement in enumerate(param.placements):
        if placement.is_shard():
            part = -(-param.shape[0] // param.device_mesh.size(i))
            rows = min(part, max(param.shape[0] - part * param.device_mesh.get_local_rank(i), 0))
    return rows


def held_bytes(model: nn.Module, before: int, offloaded: bool) -> int:
    """What this rank's weights take in fact: on a GPU what was allocated since `before`; elsewhere their storage."""
    if torch.cuda.is_available() and not offloaded:
        return torch.cuda.memory_allocated() - before + host_bytes(model)
    return host_bytes(model)


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
        self.phase, self.by_phase, self.step = "start", {}, (0, 0)

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
        self.step = tuple(map(max, self.step, now))
        self.by_phase[self.phase] = max(self.by_phase.get(self.phase, 0), now[0])


PEAKS = Peaks()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def check_loaded(model: nn.Module, held: int) -> None:
    """Raises AssertionError unless the rank holds what it should, within TOLERANCE."""
    expected = rank_bytes(model)
    rounding = PER_TENSOR * sum(1 for _ in (*model.parameters(), *model.buffers()))
    assert abs(held - expected) <= TOLERANCE * expected + rounding, (
        f"the loaded weights take {size(held)} on this rank; their shapes and dtypes say {size(expected)}"
    )
