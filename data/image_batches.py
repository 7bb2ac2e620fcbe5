"""The images of a micro-batch: planned with its tokens, and decoded by data/prefetch.py.

Shapes: B sequences of a micro-batch on one rank, T tokens of a sequence, I images, K tokens of all images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.image_format import ImageFormat
from data.images import ImageRef
from data.rows import TokenizedRows

# (index of a row's first token in the flattened batch, its tokens, its images)
_PlacedRow = tuple[int, torch.Tensor, Sequence[ImageRef]]


@dataclass(frozen=True)
class ImageBatch:
    """The images of a micro-batch on one rank: I images with K tokens in all.

    A rank without images, while another rank has some in this micro-batch, has one blank image without a
    token: the ranks gather the tower's weights together. If no rank has any, there is no ImageBatch.

    Attributes:
        format: how the model takes images; `format.normalise(values, dtype)` returns the tower's pixels.
        values: uint8; ImagePixels.values.
        grids: ImagePixels.grids.
        positions: [K] int64; indices of the images' tokens in the flattened batch of B * T tokens, image by
            image.
        owners: [B, T] int32; the number, from 1, of the image that a token is part of, 0 for text.
        bounds: (first, end) indices in the flattened batch of each image's tokens, and the first index of its
            row: [(row_start, first, end)]; on the host.
    """

    format: ImageFormat
    values: torch.Tensor
    grids: tuple[tuple[int, int], ...]
    positions: torch.Tensor
    owners: torch.Tensor
    bounds: tuple[tuple[int, int, int], ...]

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ImageBatch:
        """Return a copy with each tensor replaced by change(tensor)."""
        return dataclasses.replace(
            self,
            values=change(self.values),
            positions=change(self.positions),
            owners=change(self.owners),
        )

    def lengthen(self, length: int) -> ImageBatch:
        """Return the images of the same B sequences, padded on the right to `length` tokens."""
        before = self.owners.shape[1]
        bounds = tuple(
            (start // before * length + start % before, *_lengthen_range(first, end, before, length))
            for start, first, end in self.bounds
        )
        return dataclasses.replace(
            self,
            positions=self.positions // before * length + self.positions % before,
            owners=F.pad(self.owners, (0, length - before)),
            bounds=bounds,
        )


def _lengthen_range(first: int, end: int, before: int, length: int) -> tuple[int, int]:
    """Return where the indices [first, end) of one sequence are once it has `length` tokens, not `before`."""
    moved = first // before * length + first % before
    return moved, moved + end - first


@dataclass(frozen=True)
class PlannedImages:
    """The images of a micro-batch on one rank, before they are decoded.

    Attributes:
        format: how the model takes images.
        refs: I references; () for a rank that gets a blank image, because another rank has some.
        positions, owners, bounds: as in ImageBatch.
    """

    format: ImageFormat
    refs: tuple[ImageRef, ...]
    positions: torch.Tensor
    owners: torch.Tensor
    bounds: tuple[tuple[int, int, int], ...]

    def with_pixels(self, images: Sequence[torch.Tensor]) -> ImageBatch:
        """Return the images with their pixels. images: `read_pixels` of each of `refs`."""
        pixels = self.format.arrange(images or [self.format.blank()])
        where = (self.positions, self.owners, self.bounds)
        return ImageBatch(self.format, pixels.values, pixels.grids, *where)


def plan_images(
    rows: TokenizedRows, sequences: Sequence[Sequence[int]], shape: tuple[int, int], all_rows: torch.Tensor
) -> PlannedImages | None:
    """Return the images of a rank's micro-batch; None if no rank has any in this micro-batch.

    Args:
        rows: all examples.
        sequences: the indices of the rows of each sequence, one after another in it.
        shape: [B, T].
        all_rows: the indices of the rows that all ranks have in this micro-batch.
    """
    image_format = rows.image_format
    if image_format is None or not rows.image_counts()[all_rows].any():
        return None
    placed = list[_PlacedRow]()
    for sequence, indices in enumerate(sequences):
        row_start = sequence * shape[1]
        for row in indices:
            tokens = rows.tokens[rows.starts[row] : rows.starts[row + 1]]
            placed.append((row_start, tokens, rows.images.of_row(row)))
            row_start += len(tokens)
    return _plan_placed(placed, shape, image_format)


def plan_prompt_images(
    prompts: Sequence[tuple[Sequence[int], Sequence[ImageRef]]],
    length: int,
    image_format: ImageFormat | None,
    on_the_right: bool = False,
) -> PlannedImages | None:
    """Return the images of a batch of prompts; None if it has none.

    Args:
        prompts: (token ids, images) of each.
        length: T, of the padded batch.
        image_format: how the model takes images; None = it takes none.
        on_the_right: whether the prompts end at the batch's end, so that padding is before them.
    """
    if image_format is None or not any(refs for _, refs in prompts):
        return None
    placed = [
        (i * length + (length - len(ids)) * on_the_right, torch.tensor(ids), refs)
        for i, (ids, refs) in enumerate(prompts)
    ]
    return _plan_placed(placed, (len(prompts), length), image_format)


def _plan_placed(
    rows: Sequence[_PlacedRow], shape: tuple[int, int], image_format: ImageFormat
) -> PlannedImages:
    """Return the images of rows that have their places in a batch of `shape` [B, T]."""
    refs: list[ImageRef] = []
    positions, bounds = [torch.zeros(0, dtype=torch.int64)], []
    owners = torch.zeros(shape, dtype=torch.int32)
    for row_start, tokens, of_row in rows:
        found = (tokens == image_format.token_id).nonzero()[:, 0] + row_start
        counts = [image_format.count_tokens(ref.width, ref.height) for ref in of_row]
        for at in found.split(counts):  # raises an error unless a row has the tokens of its images
            bounds.append((row_start, int(at[0]), int(at[-1]) + 1))
            owners.view(-1)[at] = len(bounds)
        refs += of_row
        positions.append(found)
    return PlannedImages(image_format, tuple(refs), torch.cat(positions), owners, tuple(bounds))
