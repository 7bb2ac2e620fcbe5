"""Attention of rows with images: the tokens of one image see each other both ways, all others are causal.

transformers 5.23.0 lets text see later text if such rows are packed, so its own masks are not used.

Shapes: B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from data.image_batches import ImageBatch


def image_attention_inputs(
    config: PretrainedConfig,
    images: ImageBatch,
    bounds: torch.Tensor | None = None,
    sees_whole_image: bool = True,
) -> dict[str, Any]:
    """Return the keyword arguments of a text model's attention for a batch with images.

    They are masks, {kind of layer: [B, 1, T, T] bool}, made without a wait for the GPU. A token sees the
    tokens of its row that are not after it, and those of its own image; in a sliding layer none that is
    further back than the window.

    Args:
        config: the text model's config.
        images: the images of the batch.
        bounds: [N + 1] int32; where rows begin and end in the flattened batch. None: each sequence is a row.
        sees_whole_image: Vision.sees_whole_image. Otherwise attention is causal.
    """
    owners = images.owners if sees_whole_image else torch.zeros_like(images.owners)
    tokens = torch.arange(owners.numel(), device=owners.device).view(owners.shape)
    rows = tokens // owners.shape[1] if bounds is None else torch.bucketize(tokens, bounds, right=True)
    age = tokens[:, :, None] - tokens[:, None, :]  # [B, T, T]: positive for earlier tokens
    same_image = (owners[:, :, None] == owners[:, None, :]) & (owners > 0)[:, :, None]
    sees = (rows[:, :, None] == rows[:, None, :]) & ((age >= 0) | same_image)
    masks = {"full_attention": sees}
    window = getattr(config, "sliding_window", None)
    if window:
        masks["sliding_attention"] = sees & (age < window)
    return {"attention_mask": {kind: mask[:, None] for kind, mask in masks.items()}}
