"""Llama-Pro (Wu et al., arXiv 2401.02415, section 3.2): train copies of decoder layers between frozen layers.

A copy starts as the identity. Its output projections (attention's and the MLP's, weights and biases) are
zero, so both branches add nothing to the hidden states.

Where a norm follows the projections (Gemma, OLMo, EXAONE 4), the norm's weight makes the branch zero
instead, and the projections stay copies. Zeros before an RMSNorm would be the identity too, but only until
the first update: there the norm multiplies gradients by 1 / sqrt(eps), a thousand, and makes the update's
small outputs as large as those of any branch.

block_expansion.py writes the expanded model; its config.json lists the new layers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from files.config_parts import text_config
from files.model_folder import CheckpointFiles
from files.names import CONFIG
from models.family import Family
from options.errors import UserError

# In config.json, beside num_hidden_layers: indices in the expanded model, from 0, ascending.
NEW_LAYERS = "llama_pro_new_layers"


def is_expanded(config: PretrainedConfig) -> bool:
    """Return whether the config has llama_pro_new_layers, as block_expansion.py writes it."""
    return _recorded_layers(config) is not None


def _recorded_layers(config: PretrainedConfig) -> Any:
    """Return what config.json says about new layers, of an old wrapper without text_config at its top."""
    return getattr(text_config(config), NEW_LAYERS, getattr(config, NEW_LAYERS, None))


def new_layers(config: PretrainedConfig) -> list[int]:
    """Return the indices of an expanded model's new layers; UserError for other models or a wrong list.

    Layer 0 is never new: there is no layer before it to copy.
    """
    path, layers = f"{config.name_or_path}/{CONFIG}", _recorded_layers(config)
    count = text_config(config).num_hidden_layers
    if layers is None:
        raise UserError(
            f"{path}: has no {NEW_LAYERS}, so this is no expanded model; make one with"
            f" `python block_expansion.py --model_name {config.name_or_path} --new_blocks N --output_dir ...`"
        )
    valid = isinstance(layers, list) and layers and all(type(i) is int and 0 < i < count for i in layers)
    if not valid or layers != sorted(set(layers)):
        raise UserError(
            f"{path}: {NEW_LAYERS} {layers} does not fit num_hidden_layers {count}; expected ascending"
            f" indices from 1 to {count - 1}"
        )
    return layers


def check_can_leave_identity(
    files: CheckpointFiles, family: Family, new: list[int], dtype: torch.dtype, lr: float
) -> None:
    """Raise UserError if new layers are the identity and `dtype` rounds away updates of size `lr`.

    An example is -1 in bf16, whose neighbours are 0.004 and 0.008 away. The layer's other weights would not
    move either: no gradient passes the zeros.

    Args:
        files: the expanded model's tensors.
        family: its family.
        new: indices of its new layers.
        dtype: of trained weights.
        lr: the learning rate.
    """
    for name in files.tensors:
        layer, below = family.locate_layer(name)
        value = family.identity_value(below) if layer in new else None
        if value is None or not lr or any(torch.tensor(value + x).to(dtype) != value for x in (lr, -lr)):
            continue
        stored = files.read(name)
        # Layers that were trained before, or that an older version made, hold other values.
        if isinstance(stored, torch.Tensor) and (stored == value).all():
            raise UserError(
                f"{files.folder}: {name} is {value:g}, which makes a new layer add nothing, and in"
                f" {str(dtype).removeprefix('torch.')} an update of --lr {lr:g} is rounded away: nothing"
                " would be learned; use --precision auto"
            )


def spread_new_blocks(n_layers: int, n_new: int) -> list[int]:
    """Return, for each of n_new blocks, the layer (from 0) to insert it after: spread evenly over n_layers.

    The last block goes after the last layer. The numbers of layers between blocks differ by at most one.
    """
    return [-(-(block + 1) * n_layers // n_new) - 1 for block in range(n_new)]


def source_layers(n_original: int, copied_layers: list[int]) -> list[int]:
    """Return, for each layer of the expanded model, the original layer that it is or that it copies.

    Copies follow the original. n_original: number of original layers. copied_layers: for each new layer, the
    original layer that it copies.
    """
    return [layer for layer in range(n_original) for _ in range(1 + copied_layers.count(layer))]
