"""Which rank writes which part of a checkpoint, agreed upon through torch.distributed.checkpoint.

torch's own planner sends a dozen objects for each tensor, back and forth between each rank and the first, in
pickles that hold the interpreter: for some thousand tensors of eight ranks more than a second, in which the
first one's training comes to few of its launches. Here a tuple goes one way, once in a run, and rests are
taken between tensors (checkpoints/background.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from checkpoints.background import Background, Resting


class Piece(NamedTuple):
    """A part of a tensor, or the whole of one. shape: the tensor's; offsets, sizes: where in it the part lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


def piece_of(item: WriteItem) -> Piece:
    data = item.tensor_data
    assert data is not None
    part = data.chunk
    return Piece(
        item.index.fqn, data.properties.dtype, tuple(data.size), tuple(part.offsets), tuple(part.sizes)
    )


@dataclass
class Share:
    """What a rank is to write: nbytes of it; others_write: which of its pieces, by their place in its list, others have as
    well, and write."""

    nbytes: int = 0
    others_write: set[int] = field(default_factory=set)


class CopyPlanner(SavePlanner):
    """Plans by the live tensors, which know how they are sharded, and writes their copies: by name, on one rank. One for
    all checkpoints of a run: what a rank holds is described again only when it is something else than the last time.

    A plan's planner_data: on the way to the first rank the rank's Pieces, or None for those of the last time; on the way
    back its Share. The metadata's: what the manifest says of each tensor, with ranks for their files."""

    def __init__(self, background: Background):
        self.background = background
        self.layout: dict[str, torch.Tensor] = {}
        self.local: dict[str, torch.Tensor] = {}
        self.described: list[tuple] = []  # what `items` are of
        self.items: dict[Piece, WriteItem] = {}
        # Of the first rank: each rank's Pieces, and what follows from them.
        self.pieces: dict[int, list[Piece]] = {}
        self.shares: list[Share] = []
        self.tensors: dict[str, dict] = {}

    def hold(self, layout: dict[str, torch.Tensor], local: dict[str, torch.Tensor]) -> None:
        """What the next plan is of, as `collect` in training_state.py gives it; local: or copies of that."""
        self.layout, self.local = layout, local

    def agree(self, group: dist.ProcessGroup) -> None:
        """Plans before there is anything to be written. Collective. A rank that cannot comes to the gather all the same,
        for the others would wait there, and raises at the first checkpoint, where torch tells all ranks."""
        own, world = None, dist.get_world_size(group)
        plans: list[SavePlan | None] = [None] * world
        with contextlib.suppress(Exception):
            own = self.create_local_plan()
        if world > 1:
            dist.gather_object(own, plans if dist.get_rank(group) == 0 else None, group=group)
        else:
            plans = [own]
        made = [plan for plan in plans if plan is not None]
        if len(made) < world:
            self._keep(plans)
        else:
            self.create_global_plan(made)

    def set_up_planner(
        self,
        state_dict: dict[str, torch.Tensor],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None: ...

    def create_local_plan(self) -> SavePlan:
        described = [(name, tensor.shape, tensor.dtype) for name, tensor in self.local.items()]
        if described == self.described:
            return SavePlan([])
        items = {}
        for item in create_default_local_save_plan(Resting(self.layout, self.background), False).items:
            self.background.rest()
            items[piece_of(item)] = item
        self.items, self.described = items, described
        return SavePlan([], planner_data=list(self.items))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Raises ValueError if pieces do not make up their tensor."""
        self._keep(all_plans)
        if not self.tensors:
            self.shares, self.tensors = self._deal(len(all_plans))
        return [SavePlan([], planner_data=share) for share in self.shares], Metadata(
            {}, planner_data=self.tensors
        )

    def _keep(self, plans: Sequence[SavePlan | None]) -> None:
        """A rank describes its pieces once: they are kept also where no plan comes of them."""
        changed = {rank: p.planner_data for rank, p in enumerate(plans) if p and p.planner_data is not None}
        if changed:
            self.pieces |= changed
            self.tensors = {}

    def _deal(self, world: int) -> tuple[list[Share], dict[str, dict]]:
        """Of a piece that several ranks have, the one with the least so far writes it."""
        holders: dict[str, dict[Piece, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
        for rank, pieces in self.pieces.items():
            for place, piece in enumerate(pieces):
                self.background.rest()
                holders[piece.name][piece][rank] = place
        shares, tensors = [Share() for _ in range(world)], {}
        for name, held in holders.items():
            self.background.rest()
            tensors[name] = described = _described(name, list(held))
            for piece, places in held.items():
                writer = min(places, key=lambda rank: shares[rank].nbytes)
                shares[writer].nbytes += piece.nbytes
                for rank, place in places.items():
                    if rank != writer:
                        shares[rank].others_write.add(place)
                described["chunks"].append([list(piece.offsets), list(piece.sizes), writer])
        return shares, tensors

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        others = new_plan.planner_data.others_write
        items = [item for place, item in enumerate(self.items.values()) if place not in others]
        return dataclasses.replace(new_plan, items=items)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        self.background.rest()
        return self.local[write_item.index.fqn]


def _described(name: str, pieces: list[Piece]) -> dict:
    dtype, shape = pieces[0].dtype, pieces[0].shape
    same = all((p.dtype, p.shape) == (dtype, shape) for p in pieces)
    if not same or not _fill(pieces, shape):
        raise ValueError(f"{name}: its parts on all ranks do not make up the tensor")
    return {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "chunks": []}


def _fill(pieces: list[Piece], shape: tuple[int, ...]) -> bool:
    """Whether they are all rows of a tensor, each once; empty ones may be anywhere."""
    if not shape:
        return len(pieces) == 1
    row = 0
    for piece in sorted((p for p in pieces if p.nbytes), key=lambda p: p.offsets):
        if piece.offsets != (row, *[0] * (len(shape) - 1)) or piece.sizes[1:] != shape[1:]:
            return False
        row += piece.sizes[0]
    return row == shape[0] or math.prod(shape) == 0
