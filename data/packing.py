"""Packing (--packing): several rows one after another in one sequence of a batch, instead of padding.

A row attends only to itself, its positions begin at 0, and its first token is no target, so the loss is that
of the same rows one by one. Padding remains only at the end of a sequence.

All shapes that layers see are the same in every batch of a run, so layers are compiled once: sequences have
the length of the longest pack, and the bounds of rows are filled up with empty rows.

Shapes: B packs of a micro-batch, T tokens of the longest pack, N rows.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import torch

from data.batches import Batch, RowIndices, StepSampler, learned_positions
from data.rows import IGNORE, TokenizedRows
from options.config import Config

# Number of rows that are sorted by length together before they are packed. A larger window fills packs a
# little better, but the shortest rows crowd into the last packs. Every batch has bounds for as many rows as
# the most crowded packs have, and for each of them the kernel's backward takes the memory of 128 tokens.
SORT_WINDOW = 64


class _OpenPacks:
    """Packs with the same number of images, by the room that is left in them."""

    def __init__(self) -> None:
        self._by_room: dict[int, list[int]] = defaultdict(list)
        self._rooms: list[int] = []  # the keys that have packs, ascending

    def least_room(self, length: int) -> float:
        """Return the least room of a pack that takes so many tokens; infinity if none does."""
        position = bisect_left(self._rooms, length)
        return self._rooms[position] if position < len(self._rooms) else math.inf

    def pop(self, room: int) -> int:
        """Remove and return the pack with this room that came last."""
        pack = self._by_room[room].pop()
        if not self._by_room[room]:
            del self._rooms[bisect_left(self._rooms, room)]
        return pack

    def push(self, pack: int, room: int) -> None:
        """Add a pack, unless it is full."""
        if not room:
            return
        if not self._by_room[room]:
            insort(self._rooms, room)
        self._by_room[room].append(pack)


def pack_best_fit(
    lengths: Sequence[int], capacity: int, images: Sequence[int] = (), max_images: int = 0
) -> list[list[int]]:
    """Return packs as lists of indices: each row in turn goes where it leaves the least room.

    This is best fit (Johnson 1973). A row with more than `max_images` images is in a pack without other
    images.

    Args:
        lengths: number of tokens of each row, at most `capacity`.
        capacity: most tokens of a pack.
        images: number of images of each row; () = none has any.
        max_images: most images of a pack.
    """
    packs: list[list[int]] = []
    open_packs: dict[int, _OpenPacks] = {}  # by their number of images
    for i, (length, count) in enumerate(zip(lengths, images or [0] * len(lengths), strict=True)):
        most = max_images - count
        allowed = ((each.least_room(length), n) for n, each in open_packs.items() if n <= most)
        room, n_images = min(allowed, default=(math.inf, 0))
        if room < math.inf:
            pack = open_packs[n_images].pop(int(room))
        else:
            room, n_images, pack = capacity, 0, len(packs)
            packs.append([])
        packs[pack].append(i)
        total = min(n_images + count, max_images)
        open_packs.setdefault(total, _OpenPacks()).push(pack, int(room) - length)
    return packs


class PackSampler(StepSampler):
    """Deals packs of rows where StepSampler deals rows.

    The lengths in each pack, and the numbers of images, depend on those of the rows, context_length and the
    seed, so every epoch has the same number of packs. The rows of these sizes, and the order of the packs,
    are drawn from (seed, epoch). For the same reason every epoch of a mixture has the rows that the first
    one draws.

    Args:
        rows: the examples to pack, none longer than context_length.
        batch_size: packs of a micro-batch on one rank.
        accumulation, rank, world: as in StepSampler.
        seed: of the lengths in each pack, and of the rows and the order of each epoch.
        context_length: maximum number of tokens of a pack.
        max_images: maximum number of images of a pack with several rows that have some; -1 = no limit.

    Attributes:
        width: T, number of tokens of the longest pack.
        longest: number of tokens of the longest row.
        most_images: images of the pack that has most of them.
        n_bounds: N + 1, number of bounds in every batch.
    """

    def __init__(
        self,
        rows: TokenizedRows,
        batch_size: int,
        accumulation: int,
        rank: int,
        world: int,
        seed: int,
        context_length: int,
        max_images: int = -1,
    ):
        super().__init__(rows, batch_size, accumulation, rank, world, seed)
        items = self._draw(0)
        # Rows of one size, which is one number for the tokens and the images, stand in for each other.
        base = int(self._images.max()) + 1
        self._sizes = self._lengths * base + self._images
        drawn = self._sizes[items[torch.randperm(len(items), generator=self._generator(-2))]]
        drawn = torch.cat([part.sort(descending=True).values for part in drawn.split(SORT_WINDOW)])
        self._by_size = drawn.argsort(stable=True)
        lengths, images = drawn // base, drawn % base
        limit = (images.tolist(), max_images) if max_images > 0 and images.any() else ()
        packs = pack_best_fit(lengths.tolist(), context_length, *limit)
        sizes = [len(pack) for pack in packs]
        self._packs = torch.tensor(list(chain.from_iterable(packs))).split(sizes)
        filled = torch.stack([lengths[pack].sum() for pack in self._packs])
        self.width, self.longest = int(filled.max()), int(lengths.max())
        self.most_images = max(int(images[pack].sum()) for pack in self._packs)
        # Padding is also cut into rows, none longer than the longest row. A sequence may be all padding.
        filled = torch.cat([filled, torch.zeros(batch_size, dtype=torch.int64)])
        padding = (self.width - filled + self.longest - 1) // self.longest
        n_rows = padding + torch.tensor(sizes + [0] * batch_size)
        self.n_bounds = int(n_rows.sort(descending=True).values[:batch_size].sum()) + 1

    def items_per_epoch(self) -> int:
        return len(self._packs)

    def _draw(self, epoch: int) -> torch.Tensor:
        """Return the indices of the rows of every epoch."""
        return super()._draw(0)

    def _order(self, epoch: int) -> list[torch.Tensor]:
        """Return the row indices of each pack of an epoch, in the order of that epoch."""
        generator, items = self._generator(epoch), self._draw(epoch)
        drawn = items[torch.randperm(len(items), generator=generator)]
        rows = torch.empty_like(drawn)
        rows[self._by_size] = drawn[self._sizes[drawn].argsort(stable=True)]
        return [rows[self._packs[i]] for i in torch.randperm(self.items_per_epoch(), generator=generator)]

    def _rows(self, step: RowIndices) -> torch.Tensor:
        assert isinstance(step, list)
        return torch.cat(step)

    def _sequence_length(self, micro_batch: RowIndices) -> int:
        return self.width

    def _collate(self, part: RowIndices, shape: tuple[int, int], n_positions: int) -> Batch:
        assert isinstance(part, list)
        return make_packed_batch(self.rows, part, shape, self.longest, self.n_bounds, n_positions)


def max_sequence_length(config: Config, rows: TokenizedRows) -> int:
    """Return an upper limit of the tokens in one sequence of a training batch, which is a row or a pack."""
    return config.context_length if config.packing else min(int(rows.lengths().max()), config.context_length)


def mean_row_length(rows: TokenizedRows) -> float:
    """Return the number of tokens of a token's row, on average over all tokens.

    Attention computes as much as if all rows were as long.
    """
    lengths = rows.lengths().double()
    return float(lengths.square().sum() / lengths.sum())


def make_sampler(config: Config, rows: TokenizedRows, rank: int, world: int) -> StepSampler:
    """Return the sampler that deals a run's rows to one of its ranks.

    Args:
        config: the run's options: batch size, accumulation, seed, packing, context length, images of a pack.
        rows: the training rows.
        rank: the rank whose batches the sampler yields.
        world: number of ranks.
    """
    arguments = (rows, config.batch_size, config.gradient_accumulation_steps, rank, world, config.seed)
    if not config.packing:
        return StepSampler(*arguments)
    return PackSampler(*arguments, config.context_length, config.images_per_pack)


def make_packed_batch(
    rows: TokenizedRows,
    packs: Sequence[torch.Tensor],
    shape: tuple[int, int],
    longest: int,
    n_bounds: int,
    n_positions: int | None = None,
) -> Batch:
    """Return a batch whose sequences are packs: the rows of each, one after another.

    Args:
        rows: all examples.
        packs: indices of the rows of each pack.
        shape: [B, T]; sequences after the last pack are padding.
        longest: as in PackSampler.
        n_bounds: as in PackSampler.
        n_positions: as for `learned_positions`.
    """
    ids, positions, row_lengths = torch.zeros(3, *shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORE)
    for i, pack in enumerate(packs):
        starts, lengths = rows.starts[pack], rows.starts[pack + 1] - rows.starts[pack]
        row_ends = lengths.cumsum(0)
        position = torch.arange(int(row_ends[-1])) - (row_ends - lengths).repeat_interleave(lengths)
        indices = starts.repeat_interleave(lengths) + position
        tokens = rows.tokens[indices].long()
        learned = rows.learned[indices] & (position > 0)
        ids[i, : len(tokens)], positions[i, : len(tokens)] = tokens, position
        row_lengths[i, : len(tokens)] = lengths.repeat_interleave(lengths)
        targets[i, : len(tokens) - 1] = tokens.masked_fill(~learned, IGNORE)[1:]
    edges = _bounds([(rows.starts[pack + 1] - rows.starts[pack]).tolist() for pack in packs], shape, longest)
    ends = torch.tensor(edges + edges[-1:] * (n_bounds - len(edges)), dtype=torch.int32)
    return Batch(ids, targets, row_lengths, learned_positions(targets, n_positions), positions, ends, longest)


def _bounds(packs: list[list[int]], shape: tuple[int, int], longest: int) -> list[int]:
    """Return the offsets, from 0, at which rows begin and end in the flattened batch, padding included.

    Padding attends only to itself, in chunks no longer than the longest row, which kernels rely on. packs:
    the lengths of the rows of each pack. shape: [B, T].
    """
    n_sequences, width = shape
    ends = [0]
    for i in range(n_sequences):
        for length in packs[i] if i < len(packs) else ():
            ends.append(ends[-1] + length)
        while ends[-1] < (i + 1) * width:
            ends.append(min(ends[-1] + longest, (i + 1) * width))
    return ends
