"""Qwen3-VL: Qwen3 with a vision tower, for images that keep their shape.

The tower makes one embedding of each 2 x 2 patches of an image, so larger images have more tokens. Its last
part, the merger, is the projector to the text model. Further mergers read the results of some of its blocks,
and the first layers of the text model add these to the hidden states of the image tokens (deepstack,
https://arxiv.org/abs/2406.04334). Attention to images is causal. Tokens have positions of three axes.

Trained on text alone, the model is Qwen3, and loads no tower.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextRotaryEmbedding,
    Qwen3VLVisionRotaryEmbedding,
)
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from data.image_batches import ImageBatch
from models import image_grids, qwen3
from models.family import wrap_family
from models.image_grids import forward_inputs, grid_inputs, rotary_buffers, send
from models.image_settings import read_patch_images
from models.vision import ImageFeatures, TowerBlock, Vision


def add_features(hidden: torch.Tensor, where: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return hidden states [B, T, H] with features [K, H] added to those of the image tokens.

    where: [K] int64, indices in the flattened batch; or transformers' own mask [B, T], for which the host
    waits.
    """
    if where.dtype == torch.bool:
        where = where.flatten().nonzero().flatten()
    return hidden.flatten(0, 1).index_add(0, where, features.to(hidden.dtype)).view_as(hidden)


def find_tokens_by_index(text_model: PreTrainedModel) -> None:
    """Let the text model add features by the indices of tokens: by a mask the host waits in each layer."""
    text_model._deepstack_process = add_features  # type: ignore[assignment] # a function in a method's place


def tower_inputs(tower: Any, images: ImageBatch) -> dict[str, torch.Tensor]:
    """Return the tower's arguments beside the pixels: also each patch's part of the learned positions."""
    inputs = grid_inputs(images, tower.spatial_merge_size)
    parts = get_vision_interpolation_indices_and_weights(
        inputs["grid_thw"],
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=tower.spatial_merge_size,
    )
    indices, weights = (send(part, images.values.device) for part in parts)
    return inputs | {"interp_indices": indices, "interp_weights": weights}


def embed_images(
    model: Qwen3VLForConditionalGeneration, images: ImageBatch, pixels: torch.Tensor
) -> ImageFeatures:
    """Return the embeddings of the tokens of all images. pixels: [P, features of a patch]."""
    tower = model.model.visual
    found = tower(pixels, **tower_inputs(tower, images))  # without a wait, unlike its own from grid_thw
    return ImageFeatures(found.pooler_output, tuple(found.deepstack_features))


def text_inputs(config: Any, images: ImageBatch, features: ImageFeatures, inputs: dict) -> dict:
    """Return the text model's inputs with positions of three axes, and the features for its first layers."""
    return image_grids.text_inputs(config, images, features, inputs) | {
        "visual_pos_masks": images.positions,
        "deepstack_visual_embeds": list(features.by_layer),
    }


MERGERS = ("model.visual.merger", "model.visual.deepstack_merger_list.*")

VISION = Vision(
    parts=("model.visual",),
    blocks="model.visual.blocks",
    linears=("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"),
    projector=tuple(f"{merger}.{linear}" for merger in MERGERS for linear in ("linear_fc1", "linear_fc2")),
    embed=embed_images,
    forward_inputs=forward_inputs,
    read_format=read_patch_images,
    constant_buffers=partial(rotary_buffers, Qwen3VLVisionRotaryEmbedding),
    text_inputs=text_inputs,
    block=TowerBlock(attention=9, casts=0, has_rotary=True, kept=0, kept_fp32=1, ends=1),
    feature_layers=lambda config: len(config.vision_config.deepstack_visual_indexes),
)

TEXT = replace(qwen3.FAMILY, rotary_class=Qwen3VLTextRotaryEmbedding, match_checkpoint=find_tokens_by_index)
FAMILY = wrap_family(
    {"qwen3_vl_text": TEXT}, Qwen3VLForConditionalGeneration, unused=VISION.parts, vision=VISION
)
