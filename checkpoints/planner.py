"""Plans which rank writes which chunk of a checkpoint, through torch.distributed.checkpoint.

torch's own planner sends a dozen objects for each tensor back and forth between each rank and the first one,
in pickles that hold the interpreter. For some thousand tensors on eight ranks that takes more than a second,
during which rank 0's training thread can launch few kernels. Here a tuple is sent one way, once in a run,
with pauses between tensors (checkpoints/background.py).

torch's plan caching does not replace it: with torch 2.13 and the 4,481 tensors of a 70B LoRA run on two CPU
ranks (measured on 2026-11-30), each later checkpoint costs rank 0 0.20 s of CPU time against 0.006 s here,
because all tensors are described again and the metadata is sent to all ranks. It also misses a changed dtype,
and after a checkpoint that failed on a full disk the next one lacks new tensors, or fails with a KeyError.
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

from checkpoints.background import BackgroundThrottle, ThrottledDict


class TensorChunk(NamedTuple):
    """A chunk of a tensor, or the full tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the full tensor
    offsets: tuple[int, ...]  # of the chunk in the tensor
    sizes: tuple[int, ...]  # of the chunk

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


def _chunk_of(item: WriteItem) -> TensorChunk:
    """Return the chunk that torch's WriteItem describes."""
    data = item.tensor_data
    assert data is not None
    chunk = data.chunk
    return TensorChunk(
        item.index.fqn, data.properties.dtype, tuple(data.size), tuple(chunk.offsets), tuple(chunk.sizes)
    )


@dataclass
class WriteAssignment:
    """What a rank has to write.

    Attributes:
        nbytes: The size of its chunks.
        written_elsewhere: Indices into the rank's list of chunks: those that another rank has too, and
            writes.
    """

    nbytes: int = 0
    written_elsewhere: set[int] = field(default_factory=set)


class CheckpointPlanner(SavePlanner):
    """Plans from the live tensors, whose sharding is known, and writes their copies, each chunk on one rank.

    One planner serves all checkpoints of a run. A rank describes its tensors again only when they have
    changed.

    A plan's planner_data is, on the way to the first rank, the rank's TensorChunks (None: the same as the
    last time); on the way back, its WriteAssignment. The metadata's planner_data is the manifest's entry of
    each tensor, with ranks in place of their files.
    """

    def __init__(self, throttle: BackgroundThrottle):
        self.throttle = throttle
        self.layout: dict[str, torch.Tensor] = {}
        self.local: dict[str, torch.Tensor] = {}
        self.described: list[tuple] = []  # name, shape and dtype of the tensors that `items` describe
        self.items: dict[TensorChunk, WriteItem] = {}
        # On the first rank: each rank's chunks, and the plan that follows from them.
        self.chunks: dict[int, list[TensorChunk]] = {}
        self.assignments: list[WriteAssignment] = []
        self.manifest_entries: dict[str, dict] = {}

    def set_tensors(self, layout: dict[str, torch.Tensor], local: dict[str, torch.Tensor]) -> None:
        """Set the next plan's tensors, as `collect_tensors` returns them; `local` may hold copies of them."""
        self.layout, self.local = layout, local

    def exchange_plans(self, group: dist.ProcessGroup) -> None:
        """Plan the first checkpoint before there is anything to write, and raise nothing. Collective.

        A rank that fails still joins the gather, where the other ranks wait for it. It raises at the first
        checkpoint, where torch reports the error to all ranks.
        """
        own_plan, world = None, dist.get_world_size(group)
        plans: list[SavePlan | None] = [None] * world
        with contextlib.suppress(Exception):
            own_plan = self.create_local_plan()
        if world > 1:
            dist.gather_object(own_plan, plans if dist.get_rank(group) == 0 else None, group=group)
        else:
            plans = [own_plan]
        created = [plan for plan in plans if plan is not None]
        if len(created) < world:
            self._store_chunks(plans)
        else:
            self.create_global_plan(created)

    def set_up_planner(
        self,
        state_dict: dict[str, torch.Tensor],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None: ...

    def create_local_plan(self) -> SavePlan:
        """Return this rank's plan. It has the chunks only if they changed since the last plan."""
        described = [(name, tensor.shape, tensor.dtype) for name, tensor in self.local.items()]
        if described == self.described:
            return SavePlan([])
        items = {}
        for item in create_default_local_save_plan(ThrottledDict(self.layout, self.throttle), False).items:
            self.throttle.pause_if_due()
            items[_chunk_of(item)] = item
        self.items, self.described = items, described
        return SavePlan([], planner_data=list(self.items))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return (each rank's plan, the metadata), on the first rank: one rank writes each chunk.

        Raises ValueError if chunks do not cover a tensor.
        """
        self._store_chunks(all_plans)
        if not self.manifest_entries:
            self.assignments, self.manifest_entries = self._assign_writers(len(all_plans))
        plans = [SavePlan([], planner_data=assignment) for assignment in self.assignments]
        return plans, Metadata({}, planner_data=self.manifest_entries)

    def _store_chunks(self, plans: Sequence[SavePlan | None]) -> None:
        """Store the chunks that ranks describe, and drop the assignment of older ones.

        Also if a rank failed: each rank sends its chunks only once.
        """
        changed = {rank: p.planner_data for rank, p in enumerate(plans) if p and p.planner_data is not None}
        if changed:
            self.chunks |= changed
            self.manifest_entries = {}

    def _assign_writers(self, world: int) -> tuple[list[WriteAssignment], dict[str, dict]]:
        """Assign each chunk to a writer: of the ranks that have it, the one with the fewest bytes so far.

        Returns (each rank's assignment, the manifest's entry of each tensor).
        """
        holders: dict[str, dict[TensorChunk, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
        for rank, chunks in self.chunks.items():
            for index, chunk in enumerate(chunks):
                self.throttle.pause_if_due()
                holders[chunk.name][chunk][rank] = index
        assignments, entries = [WriteAssignment() for _ in range(world)], {}
        for name, tensor_chunks in holders.items():
            self.throttle.pause_if_due()
            entries[name] = entry = _manifest_entry(name, list(tensor_chunks))
            for chunk, index_of_rank in tensor_chunks.items():
                writer = min(index_of_rank, key=lambda rank: assignments[rank].nbytes)
                assignments[writer].nbytes += chunk.nbytes
                for rank, index in index_of_rank.items():
                    if rank != writer:
                        assignments[rank].written_elsewhere.add(index)
                entry["chunks"].append([list(chunk.offsets), list(chunk.sizes), writer])
        return assignments, entries

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return the plan with only those WriteItems whose chunks this rank writes, not another one."""
        skipped = new_plan.planner_data.written_elsewhere
        items = [item for index, item in enumerate(self.items.values()) if index not in skipped]
        return dataclasses.replace(new_plan, items=items)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        self.throttle.pause_if_due()
        return self.local[write_item.index.fqn]


def _manifest_entry(name: str, chunks: list[TensorChunk]) -> dict:
    """Return a tensor's manifest entry with an empty list of chunks.

    Raises ValueError unless `chunks`, those of all ranks, make up the tensor.
    """
    dtype, shape = chunks[0].dtype, chunks[0].shape
    same = all((c.dtype, c.shape) == (dtype, shape) for c in chunks)
    if not same or not _cover(chunks, shape):
        raise ValueError(f"{name}: the ranks' chunks do not cover the tensor")
    return {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "chunks": []}


def _cover(chunks: list[TensorChunk], shape: tuple[int, ...]) -> bool:
    """Return whether the chunks are all rows of a tensor, each once. Empty chunks may be anywhere."""
    if not shape:
        return len(chunks) == 1
    row = 0
    for chunk in sorted((c for c in chunks if c.nbytes), key=lambda c: c.offsets):
        if chunk.offsets != (row, *[0] * (len(shape) - 1)) or chunk.sizes[1:] != shape[1:]:
            return False
        row += chunk.sizes[0]
    return row == shape[0] or math.prod(shape) == 0
