"""Conversion between a parameter's full tensor and its shards: gather, fill, and the shard of a rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from quantization.layer import Part


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


def _shard_index(param: DTensor, rank: int) -> int:
    """Return the index of the shard that global rank `rank` holds."""
    coordinates = (param.device_mesh.mesh == rank).nonzero()[0].tolist()
    return next(coordinates[i] for i, placement in enumerate(param.placements) if placement.is_shard())


def local_shard(param: torch.Tensor, full: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the part of `full`, a parameter's full tensor, that global rank `rank` holds; not collective."""
    if not isinstance(param, DTensor):
        return full
    shards = full.chunk(shard_count(param))  # FSDP2's split: the last ranks may get less, or nothing
    index = _shard_index(param, rank)
    return shards[index] if index < len(shards) else full[:0]


def shard_range(param: torch.Tensor, rank: int) -> tuple[int, int]:
    """Return (begin, end) of the flattened elements of a parameter that global rank `rank` holds."""
    if not isinstance(param, DTensor):
        return 0, param.numel()
    rows, row = -(-param.shape[0] // shard_count(param)), param.numel() // param.shape[0]
    begin = min(_shard_index(param, rank) * rows, param.shape[0])
    return begin * row, min(begin + rows, param.shape[0]) * row


def held_range(param: torch.Tensor, part: Part, rank: int) -> tuple[int, int]:
    """Return (begin, end), counted from the part's first element, of what a rank holds of the part."""
    begin, end = shard_range(param, rank)
    first = min(max(begin - part.begin, 0), part.numel)
    return first, max(min(end - part.begin, part.numel), first)


@torch.no_grad()
def copy_held(param: torch.Tensor, part: Part, held: torch.Tensor, rank: int) -> None:
    """Copy the elements `held`, 1-D, of this rank's `held_range` of a part into its shard."""
    if not len(held):
        return
    local = param.to_local() if isinstance(param, DTensor) else param
    first = part.begin + held_range(param, part, rank)[0] - shard_range(param, rank)[0]
    local.view(-1)[first : first + len(held)].copy_(held)


def fill_part(param: torch.Tensor, part: Part | None, contents: torch.Tensor) -> None:
    """Copy this rank's elements of a part's contents, which every rank has, into a parameter, sharded or not.

    part: None = the contents are those of the whole parameter.
    """
    if part is None:
        fill_shard(param, contents)
        return
    assert contents.numel() == part.numel, f"{contents.numel()} for {part.numel}"
    rank = dist.get_rank() if dist.is_initialized() else 0
    copy_held(param, part, contents.reshape(-1)[slice(*held_range(param, part, rank))], rank)


@torch.no_grad()
def fill_shard(param: torch.Tensor, full: torch.Tensor) -> None:
    """Copy this rank's shard of `full`, which every rank has, into a tensor, sharded by FSDP or not."""
    local = param.to_local() if isinstance(param, DTensor) else param
    assert full.shape == param.shape, f"{full.shape} for {param.shape}"
    local.copy_(local_shard(param, full, dist.get_rank() if dist.is_initialized() else 0))
