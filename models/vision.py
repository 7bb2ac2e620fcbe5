"""The description of what a family with images has beside its text model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from data.image_batches import ImageBatch
from data.image_format import ImageFormat


@dataclass(frozen=True)
class Vision:
    """The vision parts of a wrapper.

    Attributes:
        blocks: dotted name of the list of the tower's blocks.
        linears: the linears of a block that `--vision_targets all` adapts and `--vision_bits 4` packs,
            relative to it.
        projector: dotted names of the linears between tower and text model that `--vision_targets projector`
            adapts.
        read_format: (config, model folder) -> how images become tokens and pixels. Raises UserError.
        embed: (model, ImageBatch, pixels of the tower's dtype, normalised) -> features.
        text_inputs: keyword arguments of the text model that depend on the images of a batch, such as
            positions of three axes.
        sees_whole_image: whether the tokens of an image see each other both ways.
    """

    blocks: str
    linears: tuple[str, ...]
    projector: tuple[str, ...]
    read_format: Callable[[PretrainedConfig, Path], ImageFormat]
    embed: Callable[[nn.Module, ImageBatch, torch.Tensor], ImageFeatures]
    text_inputs: Callable[[Any, ImageBatch, dict], dict] = lambda config, images, inputs: inputs
    sees_whole_image: bool = False


@dataclass(frozen=True)
class ImageFeatures:
    """What the tower makes of a batch's images.

    Attributes:
        tokens: [K, H]; the embeddings that replace those of the image tokens.
        by_layer: [K, H] each; added to the hidden states of the image tokens after the first layers
            (Qwen3-VL's deepstack).
    """

    tokens: torch.Tensor
    by_layer: tuple[torch.Tensor, ...] = ()
