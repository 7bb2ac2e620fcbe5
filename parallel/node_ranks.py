"""Scatters the contents of parameters to the ranks of a machine, one of which has them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from launch.ranks import RankInfo
from parallel.shards import copy_held, fill_part, held_range, local_shard, shard_count
from quantization.layer import Part


class NodeRanks:
    """The ranks of this machine, to which parameters' contents are scattered. Made by all ranks together."""

    def __init__(self, rank_info: RankInfo):
        self.rank_info, self.group = rank_info, None  # None: all ranks
        if rank_info.local_world < rank_info.world:
            self.group, _ = dist.new_subgroups(rank_info.local_world)
        self.first_rank = rank_info.rank - rank_info.local_rank

    def scatter(self, param: nn.Parameter, part: Part | None, full: torch.Tensor | None, owner: int) -> None:
        """Fill this rank's shard of a parameter, or its elements of a part. Collective in the node.

        Args:
            param: the parameter, sharded or not.
            part: the part that is filled; None = the whole parameter.
            full: The full contents, on the node's local rank `owner`; other ranks may pass None.
            owner: the local rank that has them.
        """
        if self.rank_info.local_world == 1:
            assert full is not None
            fill_part(param, part, full)
        elif part is None:
            self._scatter_whole(param, full, owner)
        else:
            self._scatter_part(param, part, full, owner)

    def _scatter_whole(self, param: nn.Parameter, full: torch.Tensor | None, owner: int) -> None:
        local = param.to_local() if isinstance(param, DTensor) else param
        # Rows of the largest shard: scatter sends equal sizes.
        rows = -(-param.shape[0] // shard_count(param))
        shards = None
        if owner == self.rank_info.local_rank:
            assert full is not None
            assert full.shape == param.shape, f"{full.shape} for {param.shape}"
            full = full.to(param.dtype)
            shards = [local_shard(param, full, rank) for rank in self._ranks()]
        received = self._scatter_rows(shards, (rows, *param.shape[1:]), param.dtype, owner)
        with torch.no_grad():
            local.copy_(received[: local.shape[0]])

    def _scatter_part(self, param: nn.Parameter, part: Part, full: torch.Tensor | None, owner: int) -> None:
        ranges = [held_range(param, part, rank) for rank in self._ranks()]
        largest = max(end - begin for begin, end in ranges)
        if not largest:  # all of it is on other nodes
            return
        shards = None
        if owner == self.rank_info.local_rank:
            assert full is not None
            assert full.numel() == part.numel, f"{full.numel()} for {part.numel}"
            full = full.to(param.dtype).reshape(-1)
            shards = [full[begin:end] for begin, end in ranges]
        received = self._scatter_rows(shards, (largest,), param.dtype, owner)
        begin, end = ranges[self.rank_info.local_rank]
        copy_held(param, part, received[: end - begin], self.rank_info.rank)

    def _ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.rank_info.local_world)

    def _scatter_rows(
        self, shards: list[torch.Tensor] | None, shape: tuple[int, ...], dtype: torch.dtype, owner: int
    ) -> torch.Tensor:
        """Return this rank's shard, padded to `shape`. shards: each rank's, on the local rank `owner`."""
        received = torch.empty(shape, dtype=dtype, device=self.rank_info.device)
        # As bytes, because codes are not numbers.
        sent = shards and [_view_as_bytes(_pad_rows(shard, shape[0])) for shard in shards]
        dist.scatter(_view_as_bytes(received), sent, src=self.first_rank + owner, group=self.group)
        return received


def _view_as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _pad_rows(shard: torch.Tensor, rows: int) -> torch.Tensor:
    """Append rows of zeros to a shard until it has `rows` rows."""
    if shard.shape[0] == rows:
        return shard
    return torch.cat([shard, shard.new_zeros(rows - shard.shape[0], *shard.shape[1:])])
