"""RoPE of type longrope (https://arxiv.org/abs/2402.13753), of Phi's 128k models: a row of more than
original_max_position_embeddings tokens (4,096) is rotated by other frequencies. transformers goes by the longest row of a
batch, for all of them. Here each row is rotated as it is alone, so that it does not matter which are computed together.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.family import Family, rope_switch

if TYPE_CHECKING:
    Base = nn.Module
else:
    Base = object  # `by_row` adds the rotary class


class ByRow(Base):
    """Comes before a rotary class of transformers' among the bases.

    row_lengths [B, 1] or [B, T]: how many tokens the row has that a token is of; None: as transformers."""

    row_lengths: torch.Tensor | None = None
    original_inv_freq: torch.Tensor  # transformers'
    attention_scaling: float

    def __init__(self, config: PretrainedConfig):
        super().__init__(config=config)
        self.most = rope_switch(config)
        # No buffer: transformers' own model has none.
        self.frequencies_of_long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=self.most + 1)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cosines, sines), [B or 1, T, features of a head that are rotated], in x's dtype."""
        if self.row_lengths is None:
            return super().forward(x, position_ids)
        long = (self.row_lengths > self.most)[..., None]
        frequencies = torch.where(long, self.frequencies_of_long, self.original_inv_freq)
        angles = position_ids[..., None].float() * frequencies
        both = torch.cat([angles, angles], -1)
        cos, sin = both.cos() * self.attention_scaling, both.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


@cache
def by_row(rotary_class: type[nn.Module]) -> type[nn.Module]:
    return type(rotary_class.__name__, (ByRow, rotary_class), {})


def make_rotary(family: Family, config: PretrainedConfig) -> nn.Module:
    """The family's rotary embedding, on the current device."""
    long, made = rope_switch(config) < math.inf, family.rotary_class
    return (by_row(made) if long else made)(config=config)  # type: ignore[arg-type]
