"""Bytes that this rank receives in collectives, counted where torch hands them to the process group."""

from __future__ import annotations

from collections import Counter

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class CollectiveBytes(TorchDispatchMode):
    """A context that counts the collectives of FSDP2 and of models/loss.py, forward and backward.

    Both call torch.distributed, whose C++ functions dispatch operators like c10d::_allgather_base_.

    Attributes:
        received: {operator: bytes}. A reduction of n bytes over W ranks counts as in a ring: all-reduce as
            2 (W - 1) / W n, reduce-scatter as (W - 1) / W n.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d."):
            self.received[name.split(".")[1]] += received_bytes(name, args)
        return func(*args, **(kwargs or {}))


def received_bytes(name: str, args) -> float:
    """Return the bytes that a rank receives in a c10d operator. Raises AssertionError for an unknown one."""
    if "_allgather_base_" in name:
        output, own = args[:2]
        return output.nbytes - own.nbytes
    if "_reduce_scatter_base_" in name:
        output, all_parts = args[:2]
        return all_parts.nbytes - output.nbytes
    assert "allreduce_" in name, name
    world = dist.ProcessGroup.unbox(args[1]).size()
    return sum(2 * (world - 1) / world * t.nbytes for t in args[0])
