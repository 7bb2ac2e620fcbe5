"""How a model takes images: their tokens in a text, and their pixels.

models/ makes an ImageFormat from a model's folder. data/ is given it, and knows nothing else of the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch


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
    def resize(self, image) -> torch.Tensor:
        """Return the pixels of a PIL image in mode RGB: uint8, for `arrange`."""

    @abstractmethod
    def arrange(self, images: Sequence[torch.Tensor]) -> ImagePixels:
        """Return the pixels of the images of a batch, in the form that the tower takes."""

    @abstractmethod
    def blank(self) -> torch.Tensor:
        """Return the pixels of the smallest image, for a rank that has none while others do."""

    def normalise(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return `ImagePixels.values` [I, 3, S, S] as the tower takes them, on their device."""
        mean, std = (values.new_tensor(of, dtype=torch.float32).view(3, 1, 1) for of in (self.mean, self.std))
        return ((values.float() / 255.0 - mean) / std).to(dtype)


@dataclass(frozen=True)
class ImagePixels:
    """The pixels of I images.

    Attributes:
        values: uint8, [I, 3, S, S]; or [P, F], the patches of all images, if sizes vary.
        grids: [(rows, columns) of patches] of each image; () if all have one size.
    """

    values: torch.Tensor
    grids: tuple[tuple[int, int], ...] = ()
