"""Choose the rows of each optimizer step, and make batches of padded rows. Packed rows: data/packing.py.

Every rank computes the rows of a step for all ranks, so it knows the step's token counts without
communication.

Shapes: B sequences of a micro-batch on one rank, T tokens of a sequence, P target positions of the batch, N
rows of a packed batch. A sequence is one row, or several with --packing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from data.image_batches import ImageBatch, PlannedImages, plan_images
from data.rows import IGNORE, TokenizedRows
from data.shares import draw_epoch
from launch.memory import page_locked_copy

RowIndices = torch.Tensor | list[torch.Tensor]  # indices of rows; with packing, a tensor per pack


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank.

    Attributes:
        ids: [B, T] int64.
        targets: [B, T] int64; the next token, or IGNORE.
        lengths: [B, 1] int64, or [B, T] if rows are packed; number of tokens in the row of each token. RoPE
            of type longrope and the auxiliary loss of routers use it.
        target_positions: [P] int64; indices of the learned targets in the flattened batch of B * T tokens,
            filled up with others by `learned_positions`. None = all positions.
        positions: [B, T] int64; of each token in its row. None if rows are not packed, like the next two.
        bounds: [N + 1] int32; where rows begin and end in the flattened batch.
        longest: number of tokens of the longest row.
        planned_images: the images, until `load_images` of data/prefetch.py decodes them.
        images: the images with their pixels. None, as planned_images is, if no rank has any.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor | None = None
    target_positions: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    bounds: torch.Tensor | None = None
    longest: int | None = None
    planned_images: PlannedImages | None = None
    images: ImageBatch | None = None

    def model_inputs(self) -> dict:
        """Return the keyword arguments of a model's forward: tokens, row lengths, images, bounds.

        transformers finds packed rows by positions that begin again, and confines its masks to them;
        models/attention.py finds them by the bounds.
        """
        assert self.planned_images is None, "the images of this batch are not decoded"
        inputs: dict[str, Any] = {"input_ids": self.ids, "row_lengths": self.lengths}
        if self.images:
            inputs["images"] = self.images
        if self.positions is None:
            return inputs
        bounds = {f"cu_seq_lens_{x}": self.bounds for x in "qk"}
        lengths = {f"max_length_{x}": self.longest for x in "qk"}
        return inputs | {"position_ids": self.positions} | bounds | lengths

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; asynchronously from page-locked memory."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory, from which copies to a GPU are asynchronous.

        Tensors for which the host refuses that stay where they are.
        """
        return self._map_tensors(page_locked_copy)

    def _map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return a copy with each tensor replaced by change(tensor)."""
        changed: dict[str, Any] = {
            name: change(v) for name, v in vars(self).items() if isinstance(v, torch.Tensor)
        }
        if self.images:
            changed["images"] = self.images.map_tensors(change)
        return dataclasses.replace(self, **changed)


@dataclass(frozen=True)
class Step:
    """The data of one optimizer step on one rank.

    Attributes:
        epoch: number of epochs, with a fraction, that are done after the step.
        batches: this rank's micro-batches.
        n_tokens: tokens of all ranks and micro-batches, without padding.
        n_targets: learned tokens of all ranks and micro-batches.
        rows: indices into the TokenizedRows, of all ranks and micro-batches.
        n_images: images of all ranks and micro-batches.
    """

    epoch: float
    batches: list[Batch]
    n_tokens: int
    n_targets: int
    rows: torch.Tensor
    n_images: int = 0

    def without_batches(self) -> Step:
        """Return the step without its batches, whose memory is needed for those of the next steps."""
        return dataclasses.replace(self, batches=[])


class StepSampler:
    """Deals the rows of an epoch to steps, micro-batches and ranks.

    The order is a permutation that depends on (seed, epoch) alone. A step takes the next
    world * accumulation * batch_size rows, so the split into ranks and micro-batches does not change its
    rows. Every row comes once per epoch, or in a mixture as often as `draw_epoch` says; the last step of an
    epoch may be smaller.

    Args:
        rows: the examples to deal.
        batch_size: rows of a micro-batch on one rank.
        accumulation: micro-batches of an optimizer step.
        rank: the rank whose batches `steps` yields.
        world: number of ranks.
        seed: of the permutations.
    """

    def __init__(
        self, rows: TokenizedRows, batch_size: int, accumulation: int, rank: int, world: int, seed: int
    ):
        self.rows, self.batch_size, self.accumulation = rows, batch_size, accumulation
        self.rank, self.world, self.seed = rank, world, seed
        self._lengths, self._targets, self._images = rows.lengths(), rows.targets(), rows.image_counts()
        self._longest = int(self._lengths.max())

    def items_per_epoch(self) -> int:
        """Return the number of rows (PackSampler: packs) that an epoch deals to all ranks."""
        return self.rows_per_epoch()

    def rows_per_epoch(self) -> int:
        """Return the number of rows of an epoch. Rows that a mixture repeats count as often as they come."""
        return sum(each.per_epoch for each in self.rows.sets) or len(self.rows)

    def steps_per_epoch(self) -> int:
        """Return the number of optimizer steps of an epoch."""
        return -(-self.items_per_epoch() // (self.batch_size * self.accumulation * self.world))

    def deal(self, epoch: int) -> Iterator[tuple[RowIndices, list[RowIndices]]]:
        """Yield (row indices of a step, the same split into its micro-batches), both of all ranks."""
        order = self._order(epoch)
        for step in _split(order, self.batch_size * self.world * self.accumulation):
            yield step, _split(step, self.batch_size * self.world)

    def _order(self, epoch: int) -> RowIndices:
        drawn = self._draw(epoch)
        return drawn[torch.randperm(len(drawn), generator=self._generator(epoch))]

    def _draw(self, epoch: int) -> torch.Tensor:
        """Return the indices of the rows of an epoch, not yet in its order."""
        sets = self.rows.sets
        return draw_epoch(sets, self.seed, epoch) if sets else torch.arange(len(self.rows))

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)

    def count_positions(self) -> int:
        """Return the number of positions in the first epoch's batches of all ranks, padding included."""
        size, total = self.batch_size, 0
        for micro_batch in _split(self._order(0), size * self.world):
            n_sequences = -(-len(micro_batch) // size) * min(size, len(micro_batch))
            total += n_sequences * self._sequence_length(micro_batch)
        return total

    def padding_share(self) -> float:
        """Return the share of padding among all positions of the first epoch, from 0 to 1."""
        return 1 - int(self._lengths[self._draw(0)].sum()) / self.count_positions()

    def steps(self, num_epochs: int, steps_done: int = 0) -> Iterator[Step]:
        """Yield the optimizer steps of `num_epochs` epochs after the first `steps_done`, for this rank.

        `steps_done` alone says how far a run is in its data.
        """
        first, skipped = divmod(steps_done, self.steps_per_epoch())
        for epoch in range(first, num_epochs):
            for i, (step, micro_batches) in enumerate(self.deal(epoch)):
                if epoch == first and i < skipped:
                    continue
                batches = [self._batch(one) for one in micro_batches]
                epochs, rows = epoch + (i + 1) / self.steps_per_epoch(), self._rows(step)
                counts = int(self._lengths[rows].sum()), int(self._targets[rows].sum())
                yield Step(epochs, batches, *counts, rows, int(self._images[rows].sum()))

    def _batch(self, micro_batch: RowIndices) -> Batch:
        """Return this rank's part of a micro-batch of all ranks, padded to the shape of the largest part.

        Ranks that share a vocabulary exchange the same number of tokens (models/loss.py), and FSDP waits for
        the slowest rank anyway. At an epoch's end a rank may have no rows.
        """
        part = micro_batch[self.rank * self.batch_size :][: self.batch_size]
        n_positions = max(
            int(self._targets[self._rows(one)].sum()) for one in _split(micro_batch, self.batch_size)
        )
        shape = min(self.batch_size, len(micro_batch)), self._sequence_length(micro_batch)
        images = plan_images(self.rows, self._sequences(part), shape, self._rows(micro_batch))
        return dataclasses.replace(self._collate(part, shape, n_positions), planned_images=images)

    def _rows(self, step: RowIndices) -> torch.Tensor:
        """Return the indices of all rows of a step, or of a part of one, as one tensor."""
        assert isinstance(step, torch.Tensor)
        return step

    def _sequences(self, part: RowIndices) -> list[list[int]]:
        """Return the indices of the rows of each sequence of a part."""
        return [each.reshape(-1).tolist() for each in part]

    def _sequence_length(self, micro_batch: RowIndices) -> int:
        """Return T of a micro-batch of all ranks: its longest row, rounded up, at most the longest of all."""
        return min(round_length(int(self._lengths[self._rows(micro_batch)].max())), self._longest)

    def _collate(self, part: RowIndices, shape: tuple[int, int], n_positions: int) -> Batch:
        return make_batch(self.rows, self._rows(part), shape, n_positions)


def round_length(length: int) -> int:
    """Round a length up to five significant binary digits: by at most 1/16.

    That leaves 16 lengths between one power of two and the next. A GPU's attention may plan anew for each new
    length: cuDNN's, as torch 2.11 calls it, takes 0.15 s on an H200.
    """
    step = 1 << max(length.bit_length() - 5, 0)
    return -(-length // step) * step


def _split(items: RowIndices, size: int) -> list[RowIndices]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def learned_positions(targets: torch.Tensor, n_positions: int | None) -> torch.Tensor:
    """Return the indices [P], in the flattened batch, of the targets [B, T] that are not IGNORE.

    They are filled up with other indices to `n_positions`, the maximum over the ranks: ranks that share a
    vocabulary need the same number of tokens (models/loss.py). None = not filled up.
    """
    ignored = targets.flatten() == IGNORE
    return ignored.sort(stable=True).indices[: int((~ignored).sum()) if n_positions is None else n_positions]


def make_batch(
    rows: TokenizedRows, indices: torch.Tensor, shape: tuple[int, int], n_positions: int | None = None
) -> Batch:
    """Return the rows `indices` as a batch of the shape [B, T].

    Rows are padded on the right, where causal attention never looks.

    Args:
        rows: all examples.
        indices: 1-D int64, at most B, maybe none; sequences after the last row are all padding.
        shape: (B, T); T is at least the length of the longest of these rows.
        n_positions: as for `learned_positions`.
    """
    spans = [(int(rows.starts[i]), int(rows.starts[i + 1])) for i in indices]
    ids, lengths = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape[0], 1, dtype=torch.int64)
    targets = torch.full(shape, IGNORE)
    for row, (start, end) in enumerate(spans):
        lengths[row] = end - start
        tokens = rows.tokens[start:end].long()
        ids[row, : end - start] = tokens
        targets[row, : end - start - 1] = tokens[1:].masked_fill(~rows.learned[start + 1 : end], IGNORE)
    return Batch(ids, targets, lengths, learned_positions(targets, n_positions))
