"""Batches of padded rows, and which rows make up an optimizer step. Packed rows: data/packing.py.

Which rows a step takes is decided for all ranks at once, so every rank knows the step's token counts without
asking the others.

Shapes: B lines of a micro-batch on one rank, T tokens of a line, P learned tokens of the batch, filled up
with others, N rows of a packed batch. A line is one row, or with --packing several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from data.rows import IGNORE, TokenizedRows

Dealt = torch.Tensor | list[torch.Tensor]  # indices of rows; with packing, of each pack's rows


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank. ids [B, T] int64, targets [B, T] int64: the next token, or IGNORE; lengths
    [B, 1] int64, of packed rows [B, T]: how many tokens the row has that a token is of; only RoPE of type
    longrope goes by it; places [P] int64: where the learned ones are in the batch as one line of B * T
    tokens, filled up with others (`learned_positions`); None: all of it.

    Only where rows are packed: positions [B, T] int64, of each token in its row; bounds [N + 1] int32: where
    rows begin and end in the batch as one line; longest: tokens of the longest row.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor | None = None
    target_positions: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    bounds: torch.Tensor | None = None
    longest: int | None = None

    def inputs(self) -> dict:
        """What SummedLossMixin takes. From positions that begin again transformers knows the rows, and confines
        its masks to them; models/attention.py knows them from the bounds."""
        own = {"input_ids": self.ids, "row_lengths": self.lengths}
        if self.positions is None:
            return own
        bounds = {f"cu_seq_lens_{x}": self.bounds for x in "qk"} | {
            f"max_length_{x}": self.longest for x in "qk"
        }
        return own | {"position_ids": self.positions} | bounds

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In page-locked memory, from which a GPU copies while the program goes on."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(v) for name, v in vars(self).items() if isinstance(v, torch.Tensor)
        }
        return dataclasses.replace(self, **changed)


@dataclass(frozen=True)
class Step:
    """What one rank does for one optimizer step; of all ranks and micro-batches: n_tokens, n_targets, rows
    (indices into the TokenizedRows)."""

    epoch: float
    batches: list[Batch]
    n_tokens: int
    n_targets: int
    rows: torch.Tensor


class StepSampler:
    """Deals the rows of an epoch to steps, micro-batches and ranks.

    The order is a permutation made from (seed, epoch) alone. A step takes the next
    world * accumulation * batch_size rows, so how they are split changes nothing about the step; every row
    comes once per epoch, and the last step of an epoch is simply smaller.
    """

    def __init__(
        self, rows: TokenizedRows, batch_size: int, accumulation: int, rank: int, world: int, seed: int
    ):
        self.rows, self.batch_size, self.accumulation = rows, batch_size, accumulation
        self.rank, self.world, self.seed = rank, world, seed
        self._lengths, self._targets = rows.lengths(), rows.targets()
        self._longest = int(self._lengths.max())

    def count(self) -> int:
        """What an epoch deals: rows. batch_size counts the same."""
        return len(self.rows)

    def steps_per_epoch(self) -> int:
        return -(-self.count() // (self.batch_size * self.accumulation * self.world))

    def deal(self, epoch: int) -> Iterator[tuple[Dealt, list[Dealt]]]:
        """Per step (all that it takes, [each micro-batch, of all ranks]): indices of rows."""
        order = self._order(epoch)
        for step in _split(order, self.batch_size * self.world * self.accumulation):
            yield step, _split(step, self.batch_size * self.world)

    def _order(self, epoch: int) -> Dealt:
        return torch.randperm(len(self.rows), generator=self._generator(epoch))

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)

    def positions(self) -> int:
        """Of the first epoch's batches, of all ranks, padding included."""
        size, total = self.batch_size, 0
        for micro in _split(self._order(0), size * self.world):
            total += -(-len(micro) // size) * min(size, len(micro)) * self._width(micro)
        return total

    def padding_share(self) -> float:
        """Padding among all positions of the first epoch."""
        return 1 - int(self._lengths.sum()) / self.positions()

    def steps(self, num_epochs: int, done: int = 0) -> Iterator[Step]:
        """The steps of the whole run, in order, after the first `done`. Where a run stands in its data is no
        more than that number."""
        first, skipped = divmod(done, self.steps_per_epoch())
        for epoch in range(first, num_epochs):
            for i, (step, micros) in enumerate(self.deal(epoch)):
                if epoch == first and i < skipped:
                    continue
                batches = [self._batch(m) for m in micros]
                epochs, rows = epoch + (i + 1) / self.steps_per_epoch(), self._rows(step)
                counts = int(self._lengths[rows].sum()), int(self._targets[rows].sum())
                yield Step(epochs, batches, *counts, rows)

    def _batch(self, micro: Dealt) -> Batch:
        """This rank's part of a micro-batch of all ranks, in the shape of the largest part: ranks that share
        a vocabulary exchange equally many tokens (models/loss.py), and FSDP waits for the slowest anyway. At
        an epoch's end a rank may be left without rows."""
        own = micro[self.rank * self.batch_size :][: self.batch_size]
        most = max(int(self._targets[self._rows(part)].sum()) for part in _split(micro, self.batch_size))
        return self._collate(own, (min(self.batch_size, len(micro)), self._width(micro)), most)

    def _rows(self, step: Dealt) -> torch.Tensor:
        """Indices of all rows of a step, or of a part of one."""
        assert isinstance(step, torch.Tensor)
        return step

    def _width(self, micro: Dealt) -> int:
        """Tokens of the longest line of a micro-batch of all ranks, rounded up, but not beyond the longest of
        all."""
        return min(rounded(int(self._lengths[self._rows(micro)].max())), self._longest)

    def _collate(self, own: Dealt, shape: tuple[int, int], most: int) -> Batch:
        return make_batch(self.rows, self._rows(own), shape, most)


def rounded(length: int) -> int:
    """Up to a number of five binary digits and zeros: at most a sixteenth more, and 16 lengths from one power
    of two to the next. A GPU's attention may plan anew for each length that it meets: cuDNN's, as torch 2.11
    calls it, takes 0.15 s on an H200."""
    step = 1 << max(length.bit_length() - 5, 0)
    return -(-length // step) * step


def _split(items: Dealt, size: int) -> list[Dealt]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def learned_positions(targets: torch.Tensor, most: int | None) -> torch.Tensor:
    """The places, in the batch as one line, of targets [B, T] that are not IGNORE, filled up with
    others to `most`, the number of the rank that has most of them: ranks that share a vocabulary bring
    equally many tokens (models/loss.py). None: not filled up."""
    ignored = targets.flatten() == IGNORE
    return ignored.sort(stable=True).indices[: int((~ignored).sum()) if most is None else most]


def make_batch(
    rows: TokenizedRows, indices: torch.Tensor, shape: tuple[int, int], most: int | None = None
) -> Batch:
    """The rows `indices` in a batch of that shape [B, T]: padded on the right, where causal attention never
    looks, and with rows of nothing but padding. most: as for `learned_positions`."""
    spans = [(int(rows.starts[i]), int(rows.starts[i + 1])) for i in indices]
    ids, lengths = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape[0], 1, dtype=torch.int64)
    targets = torch.full(shape, IGNORE)
    for row, (start, end) in enumerate(spans):
        lengths[row] = end - start
        tokens = rows.tokens[start:end].long()
        ids[row, : end - start] = tokens
        targets[row, : end - start - 1] = tokens[1:].masked_fill(~rows.learned[start + 1 : end], IGNORE)
    return Batch(ids, targets, lengths, learned_positions(targets, most))
