"""Gemma 3: norms on queries and keys, sliding and full attention.

Several layers of sliding attention come before one of full attention; each kind has rotary tables of its own.
Scores have no cap: transformers ignores attn_logit_softcapping here.

The models of 270M and 1B are a text model alone (model_type gemma3_text). The larger ones are a wrapper
(gemma3): a SigLIP tower makes one embedding per patch of an image, and a projector averages them to fewer
(256 of 4,096), which take the places of the image's tokens. All images have one size. The tokens of an image
see each other both ways. Training on text alone needs neither tower nor projector, and does not load them.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3MultiModalProjector,
    Gemma3RotaryEmbedding,
)

from data.image_batches import ImageBatch
from models.family import Family, wrap_family
from models.gemma2 import IDENTITY_INIT, WIDE_LINEARS, constant_buffers, logit_cap
from models.image_settings import read_fixed_images
from models.lora import LowRankModule
from models.vision import ImageFeatures, Vision

FAMILY = Family(
    model_class=Gemma3ForCausalLM,
    rotary_class=Gemma3RotaryEmbedding,
    identity_init=IDENTITY_INIT,
    wide_linears=WIDE_LINEARS,
    constant_buffers=constant_buffers,
    logit_cap=logit_cap,
)


def embed_images(
    model: Gemma3ForConditionalGeneration, images: ImageBatch, pixels: torch.Tensor
) -> ImageFeatures:
    """Return the embeddings of the tokens of I images, pixels [I, 3, S, S]."""
    hidden = model.model.vision_tower(pixel_values=pixels).last_hidden_state  # [I, patches, tower's width]
    return ImageFeatures(model.model.multi_modal_projector(hidden).flatten(0, 1))


def forward_inputs(images: ImageBatch, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments of transformers' forward. By token_type_ids it lets images see both ways."""
    return {"pixel_values": pixels, "token_type_ids": (images.owners > 0).long()}


def tower_buffers(config: Any) -> dict[str, torch.Tensor]:
    """Return the numbers of the patches, for the tower's embedding of positions. config: the wrapper's."""
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return {"model.vision_tower.embeddings.position_ids": torch.arange(patches)[None]}


class LoRAProjector(LowRankModule):
    """transformers' projector with LoRA on its matrix: x W + s x B A, as PEFT's ParamWrapper has it.

    A linear computes x W^T. Here W is [I, O], x @ W, and so B is [I, R] and A [R, O]. The tensors keep the
    names of the projector's.

    Args:
        base: the frozen projector.
        rank, scaling, dtype: as for LoRALinear.
    """

    def __init__(self, base: Gemma3MultiModalProjector, rank: int, scaling: float, dtype: torch.dtype):
        matrix = base.mm_input_projection_weight
        super().__init__((matrix.shape[0], matrix.shape[1]), rank, scaling, dtype, matrix.device)
        self.base = (base,)  # in a tuple it is no submodule, which would give the tensors second names
        self.patches_per_image, self.avg_pool = base.patches_per_image, base.avg_pool
        self.mm_soft_emb_norm = base.mm_soft_emb_norm
        self.mm_input_projection_weight = matrix

    def unwrap_base(self) -> nn.Module:
        base = self.base[0]
        base.mm_input_projection_weight = self.mm_input_projection_weight  # the one that was loaded
        return base

    def forward(self, vision_outputs: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of image tokens, [images, tokens, O], of patches, [images, patches, I]."""
        side = self.patches_per_image
        squares = vision_outputs.transpose(1, 2).unflatten(2, (side, side)).contiguous()
        x = self.mm_soft_emb_norm(self.avg_pool(squares).flatten(2).transpose(1, 2))
        y = x @ self.mm_input_projection_weight
        if self.active:  # apart from W, since 16 bits would round W + s B A
            y = y + x @ (self.lora_B * self.scaling).to(x.dtype) @ self.lora_A.to(x.dtype)
        return y.type_as(vision_outputs)


VISION = Vision(
    parts=("model.vision_tower", "model.multi_modal_projector"),
    blocks="model.vision_tower.encoder.layers",
    linears=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    ),
    projector=(),  # its projection is a bare matrix, not a linear
    matrices={"model.multi_modal_projector.mm_input_projection_weight": LoRAProjector},
    embed=embed_images,
    read_format=read_fixed_images,
    forward_inputs=forward_inputs,
    constant_buffers=tower_buffers,
    sees_whole_image=True,
)

WRAPPER = wrap_family(
    # transformers ignores final_logit_softcapping here
    {"gemma3_text": replace(FAMILY, logit_cap=lambda config: None)},
    Gemma3ForConditionalGeneration,
    unused=VISION.parts,
    vision=VISION,
)
