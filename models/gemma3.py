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
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3RotaryEmbedding,
)

from data.image_batches import ImageBatch
from models.family import Family, wrap_family
from models.gemma2 import IDENTITY_INIT, WIDE_LINEARS, constant_buffers, logit_cap
from models.image_settings import read_fixed_images
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
    projector=(),  # its projection is a parameter of its own, not a linear
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
