"""Phi-3, Phi-3.5 and Phi-4: query, key and value in one linear, gate and up in another.

An adapter spans all parts of a fused linear, as PEFT's does. PEFT has no default for this family; ours is the
linear that holds queries and values.
"""

from __future__ import annotations

import torch
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM, Phi3RotaryEmbedding

from models.family import Family


class RotaryByRow(Phi3RotaryEmbedding):
    """The 128k models (longrope: https://arxiv.org/abs/2402.13753) rotate a row of more than
    original_max_position_embeddings tokens (4,096) by other frequencies. transformers goes by the longest row of a batch,
    for all of them. Here each row is rotated as it is alone, so that it does not matter which rows are computed together.

    row_lengths [B, 1] or [B, T]: how many tokens a token's row has; None: as transformers.
    """

    row_lengths: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cosines, sines), [B or 1, T, features of a head that are rotated]."""
        if self.rope_type != "longrope" or self.row_lengths is None:
            return super().forward(x, position_ids)
        most = self.config.rope_parameters["original_max_position_embeddings"]
        long = self.row_lengths > most
        # By the largest position transformers chooses the frequencies. Padding after a short row may lie beyond `most`.
        of_long = super().forward(x, position_ids.where(long, most))
        of_short = super().forward(x, position_ids.where(~long, 0).clamp(max=most - 1))
        cos, sin = (torch.where(long[..., None], a, b) for a, b in zip(of_long, of_short, strict=True))
        return cos, sin


FAMILY = Family(
    model_class=Phi3ForCausalLM,
    rotary_class=RotaryByRow,
    linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    default_targets=("qkv_proj",),
)
