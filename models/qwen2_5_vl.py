"""Qwen2.5-VL: Qwen2.5 with a vision tower, for images that keep their shape.

Most blocks of the tower attend within windows of an image, so its patches are sorted by windows. Each 2 x 2
patches become one token. Attention to images is causal, and tokens have positions of three axes, as in
Qwen3-VL. Files on the hub name the text model's tensors as Qwen2 does.

Trained on text alone, the model is Qwen2.5, and loads no tower.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLVisionRotaryEmbedding,
)
from transformers.vision_utils import get_vision_window_index

from data.image_batches import ImageBatch
from models import qwen2
from models.family import wrap_family
from models.image_grids import forward_inputs, grid_inputs, rotary_buffers, send, text_inputs
from models.image_settings import read_patch_images
from models.vision import ImageFeatures, TowerBlock, Vision


def find_packed_rows(text_model: PreTrainedModel) -> None:
    """Let transformers find the rows of packed text, where its masks separate them.

    Without images, positions have one axis, [B, T]. transformers looks for rows only in the first of four.
    """
    text_model.register_forward_pre_hook(_add_axes, with_kwargs=True)


def _add_axes(_: nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
    """Return the inputs of the text model with positions of one axis as four equal ones, [4, B, T]."""
    positions = inputs.get("position_ids")
    if positions is not None and positions.dim() == 2:
        inputs = inputs | {"position_ids": positions.expand(4, -1, -1)}
    return args, inputs


def tower_inputs(tower: Any, images: ImageBatch) -> dict[str, torch.Tensor]:
    """Return the tower's arguments beside the pixels: also the order of the tokens, and their windows."""
    inputs = grid_inputs(images, tower.spatial_merge_size)
    sizes = (tower.spatial_merge_size, tower.window_size, tower.patch_size)
    order, bounds = get_vision_window_index(inputs["grid_thw"], *sizes)
    return inputs | {"window_index": send(order, images.values.device), "cu_window_seqlens": bounds}


def embed_images(
    model: Qwen2_5_VLForConditionalGeneration, images: ImageBatch, pixels: torch.Tensor
) -> ImageFeatures:
    """Return the embeddings of the tokens of all images. pixels: [P, features of a patch]."""
    tower = model.model.visual
    return ImageFeatures(tower(pixels, **tower_inputs(tower, images)).pooler_output)


VISION = Vision(
    parts=("model.visual",),
    blocks="model.visual.blocks",
    linears=("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    projector=("model.visual.merger.mlp.0", "model.visual.merger.mlp.2"),
    embed=embed_images,
    forward_inputs=forward_inputs,
    read_format=read_patch_images,
    constant_buffers=partial(rotary_buffers, Qwen2_5_VLVisionRotaryEmbedding),
    text_inputs=text_inputs,
    block=TowerBlock(
        attention=9,
        mlp=4,
        live_mlp=3,
        mlp_outputs=2,
        casts=1,
        has_rotary=True,
        has_fp32_norms=True,
        kept=0,
        ends=1,
    ),
)

TEXT = replace(qwen2.FAMILY, rotary_class=Qwen2_5_VLRotaryEmbedding, match_checkpoint=find_packed_rows)
FAMILY = wrap_family(
    {"qwen2_5_vl_text": TEXT}, Qwen2_5_VLForConditionalGeneration, unused=VISION.parts, vision=VISION
)
