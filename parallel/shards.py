"""Conversion between a parameter's full tensor and its shards: gather, fill, and the shard of a rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the gathered contents of a DTensor (collective), or a plain tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_cpu(param: nn.Parameter) -> torch.Tensor:
    """Return the full tensor of a parameter, sharded or not, on the CPU. Collective."""
    return full_tensor(param).detach().cpu()


def shard_count(param: torch.Tensor) -> int:
    """Return the number of shards into which FSDP splits a parameter along dimension 0."""
    if not isinstance(param, DTensor):
        return 1
    sizes = [param.device_mesh.size(i) for i, p in enumerate(param.placements) if p.is_shard()]
    assert len(sizes) == 1 and all(p.is_replicate() or p.is_shard(0) for p in param.placements)
    return sizes[0]


def local_shard(param: torch.Tensor, full: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the part of `full`, a parameter's full tensor, that global rank `rank` holds; not collective."""
    if not isinstance(param, DTensor):
        return full
    coordinates = (param.device_mesh.mesh == rank).nonzero()[0].tolist()
    index = next(coordinates[i] for i, placement in enumerate(param.placements) if placement.is_shard())
    shards = full.chunk(shard_count(param))  # FSDP2's split: the last ranks may get less, or nothing
    return shards[index] if index < len(shards) else full[:0]


@torch.no_grad()
def fill_shard(param: torch.Tensor, full: torch.Tensor) -> None:
    """Copy this rank's shard of `full`, which every rank has, into a tensor, sharded by FSDP or not."""
    local = param.to_local() if isinstance(param, DTensor) else param
    assert full.shape == param.shape, f"{full.shape} for {param.shape}"
    local.copy_(local_shard(param, full, dist.get_rank() if dist.is_initialized() else 0))
