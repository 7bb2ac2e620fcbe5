"""The two kinds of ImageFormat: images of one size, and images that keep their shape.

The pixels are those of transformers' image processors that use PIL (Gemma3ImageProcessorPil,
Qwen2VLImageProcessorPil): the same sizes, filters and values.

Shapes: as in data/image_format.py; f frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.image_format import ImageFormat, ImagePixels
from options.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_RATIO = 200  # of an image's sides, in Qwen-VL's processors


@dataclass(frozen=True)
class FixedImages(ImageFormat):
    """Images that are all resized to one square, without regard to their shape (Gemma 3).

    Attributes:
        text: what replaces a placeholder.
        n_tokens: tokens of an image.
        side: S.
        resample: PIL's number of the filter that resizes.
    """

    text: str
    n_tokens: int
    side: int
    resample: int

    def expand(self, width: int, height: int) -> str:
        return self.text

    def count_tokens(self, width: int, height: int) -> int:
        return self.n_tokens

    def count_pixels(self, width: int, height: int) -> int:
        return self.side**2

    def limit_side(self, side: int) -> ImageFormat:
        if side != self.side:
            raise UserError(
                f"--image_size {side}: this model has learned a position for each patch of"
                f" {self.side} x {self.side} pixels, and takes no other size; leave it out"
            )
        return self

    def resize(self, image: Image) -> torch.Tensor:
        return _resize(image, (self.side, self.side), self.resample)

    def arrange(self, images: Sequence[torch.Tensor]) -> ImagePixels:
        return ImagePixels(torch.stack(tuple(images)))

    def blank(self) -> torch.Tensor:
        return torch.zeros(3, self.side, self.side, dtype=torch.uint8)


@dataclass(frozen=True)
class PatchImages(ImageFormat):
    """Images that keep their shape, and have patches and tokens by their size (Qwen2-VL, Qwen3-VL).

    Attributes:
        wrapped_token: the texts (before the tokens, of one token, after the tokens).
        patch: p.
        merge: merge x merge patches become one token.
        frames: f; the tower takes an image as so many equal frames of a video.
        min_pixels, max_pixels: of a resized image.
        resample: PIL's number of the filter that resizes.
        max_side: the longest side of a resized image, a multiple of patch * merge; None = no limit but
            max_pixels.
    """

    wrapped_token: tuple[str, str, str]
    patch: int
    merge: int
    frames: int
    min_pixels: int
    max_pixels: int
    resample: int
    max_side: int | None = None

    def expand(self, width: int, height: int) -> str:
        before, token, after = self.wrapped_token
        return before + token * self.count_tokens(width, height) + after

    def count_tokens(self, width: int, height: int) -> int:
        new_width, new_height = self.choose_size(width, height)
        return (new_width // self._unit) * (new_height // self._unit)

    def count_pixels(self, width: int, height: int) -> int:
        return math.prod(self.choose_size(width, height))

    def limit_side(self, side: int) -> ImageFormat:
        if side < self._unit:
            raise UserError(f"--image_size {side}: this model takes at least {self._unit} pixels a side")
        return dataclasses.replace(self, max_side=side // self._unit * self._unit)

    def refuse(self, width: int, height: int) -> str:
        if max(width, height) <= MAX_RATIO * min(width, height):
            return ""
        return f"{width} x {height} pixels; this model takes images up to {MAX_RATIO} times as long as wide"

    @property
    def _unit(self) -> int:
        """Pixels of which both sides of a resized image are multiples."""
        return self.patch * self.merge

    def choose_size(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) to resize to: the multiples of the unit that are next to the sides.

        Where their area is out of bounds, the image is scaled first. If a side is above max_side then, it
        becomes max_side, and the other one is scaled with it, even below min_pixels. Raises UserError for an
        image that `refuse` refuses.
        """
        if reason := self.refuse(width, height):
            raise UserError(f"an image of {reason}")
        unit = self._unit
        sides = round(width / unit) * unit, round(height / unit) * unit  # Python's round: 0.5 -> 0
        area = sides[0] * sides[1]
        if area > self.max_pixels:
            shrink = math.sqrt((height * width) / self.max_pixels)
            sides = (
                max(unit, math.floor(width / shrink / unit) * unit),
                max(unit, math.floor(height / shrink / unit) * unit),
            )
        elif area < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            sides = math.ceil(width * grow / unit) * unit, math.ceil(height * grow / unit) * unit
        if self.max_side is None or max(sides) <= self.max_side:
            return sides
        scale, most = self.max_side / max(width, height), self.max_side
        scaled = (max(unit, round(side * scale / unit) * unit) for side in (width, height))
        new_width, new_height = (min(new, old, most) for new, old in zip(scaled, sides, strict=True))
        return new_width, new_height

    def resize(self, image: Image) -> torch.Tensor:
        return _resize(image, self.choose_size(*image.size), self.resample)

    def arrange(self, images: Sequence[torch.Tensor]) -> ImagePixels:
        grids = tuple((image.shape[1] // self.patch, image.shape[2] // self.patch) for image in images)
        return ImagePixels(torch.cat([self._cut_patches(image) for image in images]), grids)

    def _cut_patches(self, image: torch.Tensor) -> torch.Tensor:
        """Return the patches [P, 3, p, p] of an image [3, height, width], those of a token together."""
        merge, patch = self.merge, self.patch
        rows, columns = image.shape[1] // self._unit, image.shape[2] // self._unit
        blocks = image.reshape(3, rows, merge, patch, columns, merge, patch)
        return blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3, patch, patch)

    def blank(self) -> torch.Tensor:
        return torch.zeros(3, self._unit, self._unit, dtype=torch.uint8)

    def normalise(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the patches as the tower takes them: [P, 3 * f * p * p], each frame the same."""
        patches = super().normalise(values, dtype)
        return patches.unsqueeze(2).expand(-1, 3, self.frames, -1, -1).reshape(len(patches), -1)


def _resize(image: Image, size: tuple[int, int], resample: int) -> torch.Tensor:
    """Return the pixels [3, height, width] of an image, resized. size: (width, height)."""
    return torch.from_numpy(np.array(image.resize(size, resample))).permute(2, 0, 1)
