"""What a text model's attention needs to know of the images of a micro-batch.

In models such as Gemma 3 the tokens of one image see each other both ways. Where PyTorch's variable-length
attention runs, it takes the indices of the images' tokens (models/varlen.py). Elsewhere there are masks.
Both are made once per micro-batch, on its device, and the host does not wait.

transformers' own masks are not used: version 5.23 lets text see later text in packed rows with images.

Shapes: B sequences of a batch, T tokens of a sequence, R rows, I images, K tokens of images.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from data.image_batches import ImageBatch
from models.family import CAUSAL, CAUSAL_VARLEN, VARLEN

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' kinds of layers


def image_attention_inputs(
    config: PretrainedConfig,
    images: ImageBatch,
    bounds: torch.Tensor | None = None,
    sees_whole_image: bool = True,
) -> dict[str, Any]:
    """Return the keyword arguments that a text model's attention needs for a micro-batch with images.

    {} means that its attention is that of text.

    Args:
        config: the text model's. Its attention is one that `choose_attention` returns.
        images: of the micro-batch; its tensors on the model's device.
        bounds: [R + 1] int32; where rows begin and end in the flattened batch. None: each sequence is a row.
        sees_whole_image: Vision.sees_whole_image. Otherwise attention is causal within rows. The masks are
            ours then, too: transformers does not find rows by positions of three axes.
    """
    attention = config._attn_implementation
    if not sees_whole_image:
        if attention in (CAUSAL, CAUSAL_VARLEN, VARLEN):
            return {}
        return {"attention_mask": attention_masks(config, torch.zeros_like(images.owners), bounds)}
    if not len(images.positions):  # a blank image
        return {}
    if attention in (CAUSAL_VARLEN, VARLEN):
        return _kernel_inputs(images)
    return {"attention_mask": attention_masks(config, images.owners, bounds)}


def _kernel_inputs(images: ImageBatch) -> dict[str, Any]:
    """Return the arguments of `attend_within_rows` for images. The host knows all their sizes."""
    lengths = [end - first for _, first, end in images.bounds]
    n_queries = sum(max(length - 1, 0) for length in lengths)
    if not n_queries:  # each image is one token
        return {}
    owners = images.owners.flatten()[images.positions]
    is_last = owners != torch.cat([owners[1:], owners.new_zeros(1)])
    order = is_last.to(torch.uint8).argsort(stable=True)[:n_queries]
    numbers = torch.arange(len(lengths) + 1, dtype=owners.dtype, device=owners.device)
    ends = torch.searchsorted(owners[order], numbers, right=True, out_int32=True)
    return {
        "image_queries": images.positions[order].flip(0),
        "image_bounds": (n_queries - ends).flip(0),
        "longest_image": max(lengths) - 1,
    }


def attention_masks(
    config: PretrainedConfig, owners: torch.Tensor, bounds: torch.Tensor | None = None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return the masks of a text model's layers, [B, 1, T, T] booleans: True where a token sees another.

    Args:
        config: the text model's.
        owners: [B, T], as in ImageBatch. Zeros: attention is causal.
        bounds: as in `image_attention_inputs`.

    Returns:
        {kind of layer: mask} if the model has kinds of layers, else one mask for all layers.
    """
    window = getattr(config, "sliding_window", None) or None
    if window is not None and window >= owners.shape[1]:
        window = None  # it hides nothing: both kinds of layers share a mask
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return _mask(owners, bounds, window)
    windows = {kind: {FULL: None, SLIDING: window}[kind] for kind in kinds}
    masks = {each: _mask(owners, bounds, each) for each in set(windows.values())}
    return {kind: masks[each] for kind, each in windows.items()}


def _mask(owners: torch.Tensor, bounds: torch.Tensor | None, window: int | None) -> torch.Tensor:
    """Return the mask of one kind of layer, [B, 1, T, T].

    A token sees those of its row that are not later than itself, or in the same image, and of these only the
    ones that are less than `window` tokens before it.
    """
    batch, length = owners.shape
    positions = torch.arange(length, device=owners.device)
    age = positions[:, None] - positions
    same_image = (owners[:, :, None] == owners[:, None, :]) & (owners[:, None, :] > 0)
    mask = same_image | (age >= 0)
    if window is not None:
        mask &= age < window
    if bounds is not None:
        tokens = torch.arange(batch * length, dtype=bounds.dtype, device=owners.device)
        rows = torch.searchsorted(bounds, tokens, right=True).view(batch, length)
        mask &= rows[:, :, None] == rows[:, None, :]
    return mask[:, None]
