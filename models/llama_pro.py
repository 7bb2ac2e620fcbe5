"""Llama-Pro (Wu et al., arXiv 2401.02415, section 3.2): copies of decoder layers are put between the layers of
a trained model, and only they are trained. A copy starts as the identity: its output projections - attention's
and the MLP's, weights and biases - are zero, so both branches add nothing to the hidden states.

Where a norm follows them (Gemma 2 and 3), a branch is silenced by the norm's weight instead, and its projections stay
copies. Zeros before an RMSNorm are the identity too, but one that the first update ends: there the norm multiplies
gradients by 1 / sqrt(eps), a thousand, and whatever small outputs the update leaves it makes as large as any branch's.

block_expansion.py writes the expanded model, and config.json says which of its layers are new.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from files.model_folder import CheckpointFiles
from files.names import CONFIG
from models.family import Family
from options.errors import UserError

NEW_LAYERS = "llama_pro_new_layers"  # in config.json: indices in the expanded model, from 0, ascending


def is_expanded(config: PretrainedConfig) -> bool:
    return getattr(config, NEW_LAYERS, None) is not None


def new_layers(config: PretrainedConfig) -> list[int]:
    """The indices of an expanded model's new layers. Raises UserError for any other model, and for a list that
    cannot be true: there is no layer before the first one that it could be a copy of."""
    where, count = f"{config.name_or_path}/{CONFIG}", config.num_hidden_layers
    layers = getattr(config, NEW_LAYERS, None)
    if layers is None:
        raise UserError(
            f"{where}: has no {NEW_LAYERS}, so this is no expanded model; make one with"
            f" `python block_expansion.py --model_name {config.name_or_path} --new_blocks N --output_dir ...`"
        )
    good = isinstance(layers, list) and layers and all(type(i) is int and 0 < i < count for i in layers)
    if not good or layers != sorted(set(layers)):
        raise UserError(
            f"{where}: {NEW_LAYERS} {layers} does not fit num_hidden_layers {count}; expected ascending"
            f" indices from 1 to {count - 1}"
        )
    return layers


def check_can_leave_silence(
    files: CheckpointFiles, family: Family, new: list[int], trained: torch.dtype, lr: float
) -> None:
    """Raises UserError if new layers would stay the identity: where the dtype of trained weights rounds updates of the
    size lr away from the value that silences a layer (from -1 in bf16, whose neighbours are 0.004 and 0.008 away). No
    gradient passes the zeros behind it, so the layer's other weights would not move either."""
    for name in files.tensors:
        layer, rest = family.locate_layer(name)
        value = family.silent_value(rest) if layer in new else None
        if value is None or not lr or any(torch.tensor(value + x).to(trained) != value for x in (lr, -lr)):
            continue
        stored = files.read(name)
        # A layer that was trained before, or that an older version made, holds other values.
        if isinstance(stored, torch.Tensor) and (stored == value).all():
            raise UserError(
                f"{files.folder}: {name} is {value:g}, which makes a new layer add nothing, and in"
                f" {str(trained).removeprefix('torch.')} an update of --lr {lr:g} is rounded away: nothing would be"
                " learned; use --precision auto"
            )


def evenly(layers: int, new: int) -> list[int]:
    """After which of `layers` layers, counted from 0, each of `new` blocks goes: the last one after the last
    layer, and of two stretches between them none longer than the other by more than one."""
    return [-(-(block + 1) * layers // new) - 1 for block in range(new)]


def sources(layers: int, after: list[int]) -> list[int]:
    """For each layer of the expanded model the layer that it is, or is a copy of. A layer's copies follow it."""
    return [layer for layer in range(layers) for _ in range(1 + after.count(layer))]
