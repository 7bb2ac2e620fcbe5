"""The images of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data.image_format import ImageFormat


@dataclass(frozen=True)
class ImageBatch:
    """The images of a micro-batch on one rank: I images with K tokens in all.

    A rank without images, while another rank has some in this micro-batch, has one blank image without a
    token: the ranks gather the tower's weights together. If no rank has any, there is no ImageBatch.

    Attributes:
        format: how the model takes images; its `normalise` makes the tower's pixels of `values`.
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
