"""Packing (--packing): several rows behind one another in one line of a batch, instead of padding.

A row sees only itself, its positions begin at 0, and its first token is nobody's target: the loss is that of
the same rows one by one. Padding is left at the end of a line only, at position 0.

All shapes that layers see are the same in every batch of a run, so that they are compiled once: lines have
the length of the longest pack, and the bounds of rows are filled up with rows of no tokens.

Shapes: B packs of a micro-batch, T tokens of the longest pack, N rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import torch

from data.batches import Batch, Dealt, StepSampler, learned_positions
from data.rows import IGNORE, TokenizedRows
from options.config import Config

# Rows that are put in order of length at a time, before they are packed. With more of them packs are a little
# fuller, but the shortest rows crowd in the last ones, and every batch has bounds for as many rows as the
# most crowded ones have; for each the kernel's backward takes memory, of 128 tokens.
WINDOW = 64


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs as lists of indices: each row in turn goes where it leaves the least room (best fit; Johnson
    1973). lengths: none above capacity."""
    packs: list[list[int]] = []
    roomy: dict[int, list[int]] = defaultdict(list)  # packs by the room that is left in them
    rooms: list[int] = []  # the keys that have packs, ascending
    for i, length in enumerate(lengths):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            pack = roomy[room].pop()
            if not roomy[room]:
                del rooms[at]
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(i)
        left = room - length
        if left and not roomy[left]:
            insort(rooms, left)
        roomy[left].append(pack)
    return packs


class PackSampler(StepSampler):
    """Deals packs of rows where StepSampler deals rows.

    Which lengths make up a pack follows from the rows' lengths, context_length and the seed, so every epoch
    has the same number of packs. Which of the rows of a length they are, and the order of the packs, is drawn
    from (seed, epoch).

    width: T, tokens of the longest pack; longest: of the longest row; bounds: N + 1, of every batch.
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
    ):
        super().__init__(rows, batch_size, accumulation, rank, world, seed)
        drawn = self._lengths[torch.randperm(len(rows), generator=self._generator(-2))]
        lengths = torch.cat([part.sort(descending=True).values for part in drawn.split(WINDOW)])
        self._by_length = lengths.argsort(stable=True)
        packs = best_fit(lengths.tolist(), context_length)
        sizes = [len(pack) for pack in packs]
        self._packs = torch.tensor(list(chain.from_iterable(packs))).split(sizes)
        filled = torch.stack([lengths[pack].sum() for pack in self._packs])
        self.width, self.longest = int(filled.max()), int(lengths.max())
        # Padding is cut into rows as well, of which none is too long. A line may be nothing else.
        filled = torch.cat([filled, torch.zeros(batch_size, dtype=torch.int64)])
        padding = (self.width - filled + self.longest - 1) // self.longest
        pieces = padding + torch.tensor(sizes + [0] * batch_size)
        self.bounds = int(pieces.sort(descending=True).values[:batch_size].sum()) + 1

    def count(self) -> int:
        return len(self._packs)

    def _order(self, epoch: int) -> list[torch.Tensor]:
        generator = self._generator(epoch)
        drawn = torch.randperm(len(self.rows), generator=generator)
        rows = torch.empty_like(drawn)
        rows[self._by_length] = drawn[self._lengths[drawn].argsort(stable=True)]
        return [rows[self._packs[i]] for i in torch.randperm(self.count(), generator=generator)]

    def _rows(self, step: Dealt) -> torch.Tensor:
        assert isinstance(step, list)
        return torch.cat(step)

    def _width(self, micro: Dealt) -> int:
        return self.width

    def _collate(self, own: Dealt, shape: tuple[int, int], most: int) -> Batch:
        assert isinstance(own, list)
        return make_packed(self.rows, own, shape, self.longest, self.bounds, most)


def longest_line(config: Config, rows: TokenizedRows) -> int:
    """Tokens that a line of a training batch has at most."""
    return config.context_length if config.packing else min(int(rows.lengths().max()), config.context_length)


def make_sampler(config: Config, rows: TokenizedRows, rank: int, world: int) -> StepSampler:
    """What deals a run's rows to one of its ranks."""
    dealt = (rows, config.batch_size, config.gradient_accumulation_steps, rank, world, config.seed)
    return PackSampler(*dealt, config.context_length) if config.packing else StepSampler(*dealt)


def make_packed(
    rows: TokenizedRows,
    packs: Sequence[torch.Tensor],
    shape: tuple[int, int],
    longest: int,
    bounds: int,
    most: int | None = None,
) -> Batch:
    """The rows of each pack behind one another, in a batch of that shape [B, T]; lines that are left over are
    padding. packs: indices of rows; longest, bounds: as in PackSampler; most: as for `learned_positions`."""
    ids, positions, of_row = torch.zeros(3, *shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORE)
    for line, pack in enumerate(packs):
        starts, lengths = rows.starts[pack], rows.starts[pack + 1] - rows.starts[pack]
        stops = lengths.cumsum(0)
        position = torch.arange(int(stops[-1])) - (stops - lengths).repeat_interleave(lengths)
        where = starts.repeat_interleave(lengths) + position
        tokens = rows.tokens[where].long()
        learned = rows.learned[where] & (position > 0)
        ids[line, : len(tokens)], positions[line, : len(tokens)] = tokens, position
        of_row[line, : len(tokens)] = lengths.repeat_interleave(lengths)
        targets[line, : len(tokens) - 1] = tokens.masked_fill(~learned, IGNORE)[1:]
    edges = _bounds([(rows.starts[pack + 1] - rows.starts[pack]).tolist() for pack in packs], shape, longest)
    ends = torch.tensor(edges + edges[-1:] * (bounds - len(edges)), dtype=torch.int32)
    return Batch(ids, targets, of_row, learned_positions(targets, most), positions, ends, longest)


def _bounds(packs: list[list[int]], shape: tuple[int, int], longest: int) -> list[int]:
    """Where rows begin and end in the batch as one line; packs: the lengths of their rows. Padding is
    attended to within itself, in pieces that no kernel finds longer than the longest row."""
    lines, width = shape
    ends = [0]
    for line in range(lines):
        for length in packs[line] if line < len(packs) else ():
            ends.append(ends[-1] + length)
        while ends[-1] < (line + 1) * width:
            ends.append(min(ends[-1] + longest, (line + 1) * width))
    return ends
