"""RoPE of type longrope (https://arxiv.org/abs/2402.13753), of Phi's 128k models, switched for each row.

A row of more than original_max_position_embeddings tokens (4,096) is rotated by other frequencies.
transformers decides by the longest row of a batch, for all its rows. Here each row is rotated as it would be
alone, so the result does not depend on the rows that share a batch. The tables of both kinds of rows come
from the family's own rotary class: families lay out the features of a head in different ways (Cohere2).

Shapes: B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from files.config_parts import text_config
from models.family import Family, longrope_threshold

if TYPE_CHECKING:
    Base = nn.Module
else:
    Base = object  # `_per_row_class` adds the rotary class


class PerRowLongRope(Base):
    """A mixin for a rotary class of transformers.

    row_lengths [B, 1] or [B, T]: tokens of the row that each token belongs to. None: transformers' own
    forward.
    """

    rotary_class: type[nn.Module]
    row_lengths: torch.Tensor | None = None
    original_inv_freq: torch.Tensor  # transformers' frequencies of short rows

    def __init__(self, config: PretrainedConfig):
        super().__init__(config=config)
        self.threshold = longrope_threshold(config)
        # Not a buffer: transformers' own model has none.
        self.long_inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=self.threshold + 1)
        # In a tuple they are no submodules, so the model has no other buffers than transformers' own.
        frequencies = (self.original_inv_freq, self.long_inv_freq)
        self.short_and_long = tuple(_fixed_rotary(self.rotary_class, config, f) for f in frequencies)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cosines, sines), each [B or 1, T, rotated features of a head], in x's dtype."""
        if self.row_lengths is None:
            return super().forward(x, position_ids)
        is_long = (self.row_lengths > self.threshold)[..., None]
        short, long = (rotary(x, position_ids) for rotary in self.short_and_long)
        return torch.where(is_long, long[0], short[0]), torch.where(is_long, long[1], short[1])


def _fixed_rotary(
    rotary_class: type[nn.Module], config: PretrainedConfig, inv_freq: torch.Tensor
) -> nn.Module:
    """Return a rotary embedding whose forward uses these frequencies, whatever the positions are.

    Args:
        rotary_class: the family's.
        config: with longrope, whose factor of cosines and sines does not depend on the frequencies.
        inv_freq: [rotated features / 2] fp32.
    """
    rotary: Any = rotary_class(config=config)
    rotary.rope_type = "default"  # the one for which transformers' forward changes no frequencies
    rotary.inv_freq = inv_freq
    return rotary


@cache
def _per_row_class(rotary_class: type[nn.Module]) -> type[nn.Module]:
    return type(rotary_class.__name__, (PerRowLongRope, rotary_class), {"rotary_class": rotary_class})


def make_rotary(family: Family, config: PretrainedConfig) -> nn.Module:
    """Build the model's rotary embedding on torch's default device; with longrope, a PerRowLongRope."""
    config, cls = text_config(config), family.rotary_class
    if longrope_threshold(config) < math.inf:
        cls = _per_row_class(cls)  # type: ignore[arg-type]
    return cls(config=config)
