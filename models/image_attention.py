"""Attention of rows with images: the tokens of one image see each other both ways, all others are causal.

transformers 5.23.0 lets text see later text if such rows are packed, so its own masks are not used.

Shapes: B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from data.image_batches import ImageBatch


def image_attention_inputs(config: PretrainedConfig, images: ImageBatch, inputs: dict) -> dict:
    """Return the keyword arguments with which a text model sees whole images.

    They are masks, {kind of layer: [B, 1, T, T] bool}, made without a wait for the GPU. A token sees the
    tokens of its row that are not after it, and those of its own image; in a sliding layer none that is
    further back than the window.

    Args:
        config: the text model's config.
        images: the images of the batch.
        inputs: the text model's other arguments; of packed rows cu_seq_lens_q has the bounds.
    """
    owners = images.owners
    tokens = torch.arange(owners.numel(), device=owners.device).view(owners.shape)
    bounds = inputs.get("cu_seq_lens_q")
    rows = tokens // owners.shape[1] if bounds is None else torch.bucketize(tokens, bounds, right=True)
    age = tokens[:, :, None] - tokens[:, None, :]  # [B, T, T]: positive for earlier tokens
    same_image = (owners[:, :, None] == owners[:, None, :]) & (owners > 0)[:, :, None]
    sees = (rows[:, :, None] == rows[:, None, :]) & ((age >= 0) | same_image)
    masks = {"full_attention": sees}
    window = getattr(config, "sliding_window", None)
    if window:
        masks["sliding_attention"] = sees & (age < window)
    return {"attention_mask": {kind: mask[:, None] for kind, mask in masks.items()}}
