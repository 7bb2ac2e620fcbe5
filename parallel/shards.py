"""Between a parameter's full contents and its shards: gather, fill, and which part a rank holds."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full contents of a DTensor (collective), or a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(param: nn.Parameter) -> torch.Tensor:
    """The full contents of a parameter, sharded or not, on the CPU. Collective."""
    return whole(param).detach().cpu()


def shard_count(param: nn.Parameter) -> int:
    """Into how many parts FSDP cuts a parameter along dimension 0."""
    if not isinstance(param, DTensor):
        return 1
    sizes = [param.device_mesh.size(i) for i, p in enumerate(param.placements) if p.is_shard()]
    assert len(sizes) == 1 and all(p.is_replicate() or p.is_shard(0) for p in param.placements)
    return sizes[0]


def part(param: nn.Parameter, full: torch.Tensor, rank: int) -> torch.Tensor:
    """The part of a parameter's full contents that global rank `rank` holds."""
    if not isinstance(param, DTensor):
        return full
    where = (param.device_mesh.mesh == rank).nonzero()[0].tolist()
    place = next(where[i] for i, placement in enumerate(param.placements) if placement.is_shard())
    parts = full.chunk(shard_count(param))  # FSDP2's split: the last ranks may get less, or nothing
    return parts[place] if place < len(parts) else full[:0]


@torch.no_grad()
def fill(param: nn.Parameter, full: torch.Tensor) -> None:
    """Copies this rank's part of `full`, which every rank has, into a parameter, sharded by FSDP or whole."""
    local = param.to_local() if isinstance(param, DTensor) else param
    assert full.shape == param.shape, f"{full.shape} for {param.shape}"
    local.copy_(part(param, full, dist.get_rank() if dist.is_initialized() else 0))
