"""A planned model with new Llama-Pro blocks that do not exist yet: plan.py --new_blocks."""

from __future__ import annotations

import dataclasses

from checkpoints.block_expansion import expanded_config
from files.config_parts import text_config
from files.weight_headers import WeightHeaders
from models.llama_pro import is_expanded, source_layers, spread_new_blocks
from models.registry import build_on_meta, check_shapes
from options.errors import UserError
from options.limits import MAX_LAYERS
from training.planned_model import PlannedModel


def expand_planned(planned: PlannedModel, new_blocks: int) -> PlannedModel:
    """Return the model as `block_expansion.py --new_blocks` would write it.

    Raises UserError if the model cannot get new blocks.
    """
    base, family = planned.model.config, planned.family
    count = text_config(base).num_hidden_layers
    if is_expanded(base):
        raise UserError(
            f"--new_blocks {new_blocks}: {planned.name} is expanded already; leave the option out"
        )
    if planned.files.prequantized:
        raise UserError(f"--new_blocks {new_blocks}: {planned.name} is quantized; give its base model")
    if count + new_blocks > MAX_LAYERS:
        raise UserError(f"--new_blocks {new_blocks}: with {count} layers, at most {MAX_LAYERS:,} are built")
    originals = source_layers(count, spread_new_blocks(count, new_blocks))
    config = type(base).from_dict(expanded_config(base.to_dict(), base, originals))
    config.name_or_path = base.name_or_path
    files = WeightHeaders(planned.files.folder)
    for name, stored in planned.files.tensors.items():
        layer, below = family.locate_layer(name)
        if layer is None:
            files.tensors[name] = stored
        for i, original in enumerate(originals):
            if original == layer:
                files.tensors[f"{family.layers}.{i}.{below}"] = stored
    model = build_on_meta(config, family)
    check_shapes(model, files)
    return dataclasses.replace(planned, model=model, files=files)
