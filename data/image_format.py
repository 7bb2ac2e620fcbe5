"""How a model takes images: their tokens in a text, and their pixels.

models/ makes an ImageFormat from a model's folder. data/ is given it, and knows nothing else of the model.
data/image_sizes.py has its two kinds.

Shapes: I images, P patches of all images, S pixels of a side, p pixels of a patch's side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImagePixels:
    """The pixels of I images.

    Attributes:
        values: uint8, [I, 3, S, S]; or [P, 3, p, p], the patches of all images, if sizes vary.
        grids: [(rows, columns) of patches] of each image; () if all have one size.
    """

    values: torch.Tensor
    grids: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ImageFormat(ABC):
    """The images of a model.

    Attributes:
        placeholder: the text with which chat templates mark an image.
        token_id: id of the token that stands for a part of an image. Such tokens are never learned.
        reserved: texts of special tokens of images, which a row's own texts must not contain.
        mean, std: [3]; a pixel channel of value v in 0..255 is (v / 255 - mean) / std for the tower.
    """

    placeholder: str
    token_id: int
    reserved: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @abstractmethod
    def expand(self, width: int, height: int) -> str:
        """Return the text that replaces a placeholder, for an image of these pixels."""

    @abstractmethod
    def count_tokens(self, width: int, height: int) -> int:
        """Return the number of tokens `token_id` in that text."""

    @abstractmethod
    def count_pixels(self, width: int, height: int) -> int:
        """Return the number of pixels to which an image of these pixels is resized."""

    @abstractmethod
    def limit_side(self, side: int) -> ImageFormat:
        """Return the format with images of at most `side` pixels a side (--image_size). None becomes larger.

        Raises UserError if the model does not allow that.
        """

    @abstractmethod
    def resize(self, image: Image) -> torch.Tensor:
        """Return the pixels of a PIL image in mode RGB, resized: [3, height, width] uint8."""

    @abstractmethod
    def arrange(self, images: Sequence[torch.Tensor]) -> ImagePixels:
        """Return the pixels of a batch's images, of `resize` or `blank`, in the form that the tower takes."""

    @abstractmethod
    def blank(self) -> torch.Tensor:
        """Return the pixels of the smallest image, for a rank that has none while others do."""

    def refuse(self, width: int, height: int) -> str:
        """Return why the model cannot take an image of these pixels; "" if it can."""
        return ""

    def normalise(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return `ImagePixels.values` as the tower takes them, on their device. Waits for nothing.

        In fp32 they equal the processor's bit for bit. Each constant is a tensor, filled on the device: torch
        replaces a division by a Python number by a product on a GPU, which rounds otherwise.
        """

        def constant(value: float) -> torch.Tensor:
            return torch.full((1,), value, device=values.device)

        mean, std = (torch.cat([constant(x) for x in of]).view(3, 1, 1) for of in (self.mean, self.std))
        return ((values.float() / constant(255.0) - mean) / std).to(dtype)
