"""Images that keep their shape, as Qwen-VL has them: inputs of the tower, and positions of three axes.

Such a model's rotary embedding has positions (time, row, column) (https://arxiv.org/abs/2409.12191, section
2.1). For text the three are equal. In an image the time stands still, and row and column count its tokens.
transformers computes all this from tensors whose contents it reads, so the host would wait for a GPU. Here
the host computes from the grids, which it knows, and nothing waits.

Shapes: B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from data.image_batches import ImageBatch
from data.image_sizes import PatchImages
from launch.memory import page_locked_copy
from models.vision import ImageFeatures


def grid_inputs(images: ImageBatch, merge: int) -> dict[str, torch.Tensor]:
    """Return the arguments of a tower, beside the pixels, that follow from the sizes of the images.

    grid_thw has the numbers of frames and of patches, cu_seqlens the bounds of images; both stay on the host,
    which reads them in each block. position_ids has each patch's row and column.

    Args:
        images: of a batch.
        merge: merge x merge patches are one token.
    """
    grids = torch.tensor([(1, *grid) for grid in images.grids])
    return {
        "grid_thw": grids,
        "cu_seqlens": get_vision_cu_seqlens(grids),
        "position_ids": send(get_vision_position_ids(grids, merge), images.values.device),
    }


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to a device, without a wait."""
    source = page_locked_copy(tensor) if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def image_positions(images: ImageBatch, merge: int, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Return the positions of all tokens on three axes, [3, B, T] int64, on the device of the images.

    Each row begins at 0. An image's tokens begin one after the token before it. The token after an image
    comes one after the image's largest position. So the positions behind an image are lower than in text,
    where each token has its own.

    Args:
        images: of a batch.
        merge: merge x merge patches are one token.
        positions: [B, T] int64; of each token in its row. None: each sequence is a row.
    """
    shape, device = images.owners.shape, images.owners.device
    tokens = torch.arange(shape.numel(), device=device)
    within = tokens % shape[1] if positions is None else positions.flatten()
    found = within.expand(3, -1).clone()
    shift = torch.zeros(shape.numel() + 1, dtype=torch.int64, device=device)
    for (_, first, end), grid in zip(images.bounds, images.grids, strict=False):  # a blank one has no bounds
        rows, columns = (side // merge for side in grid)
        index = torch.arange(end - first, device=device)
        found[:, first:end] += torch.stack([-index, index // columns - index, index % columns - index])
        shift[end] += max(rows, columns) - (end - first)
    shift = shift[:-1].cumsum(0)
    return (found + shift - shift[tokens - within]).view(3, *shape)


def text_inputs(config: Any, images: ImageBatch, features: ImageFeatures, inputs: dict) -> dict:
    """Return the text model's inputs with positions of three axes (Vision.text_inputs)."""
    assert isinstance(images.format, PatchImages)
    positions = image_positions(images, images.format.merge, inputs.get("position_ids"))
    return inputs | {"position_ids": positions}


def forward_inputs(images: ImageBatch, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments of transformers' forward (Vision.forward_inputs), which reads the grids.

    By mm_token_type_ids it makes the positions of three axes.
    """
    grids = torch.tensor([(1, *grid) for grid in images.grids])
    kinds = (images.owners > 0).int()
    return {
        "pixel_values": pixels,
        "image_grid_thw": send(grids, pixels.device),
        "mm_token_type_ids": kinds,
    }


def rotary_buffers(rotary_class: Any, config: Any) -> dict[str, torch.Tensor]:
    """Return the frequencies of the tower's rotary embedding, and their copy. config: the wrapper's."""
    frequencies, _ = rotary_class.compute_axial_rope_parameters(config.vision_config)
    names = ("inv_freq", "original_inv_freq")
    return {f"model.visual.rotary_pos_emb.{name}": frequencies.clone() for name in names}
