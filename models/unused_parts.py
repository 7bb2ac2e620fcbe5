"""The parts of a wrapper that text does not need and that are not built: their tensors in the files.

A model folder that is written gets a copy of them (`WeightHeaders.apart`). So a damaged vision tower would
stay damaged, without an error before somebody shows the result a picture.
"""

from __future__ import annotations

from typing import cast

import torch
from transformers import PretrainedConfig, PreTrainedModel

from files.weight_headers import WeightHeaders
from models.checkpoint_names import ParameterNames
from models.family import Family


def check_unused_parts(config: PretrainedConfig, family: Family, files: WeightHeaders) -> None:
    """Raise UserError if a part that is not built lacks some of its tensors, or has one of another shape.

    Compares headers alone. A part may be missing as a whole (`absent_parts`), and may have further tensors,
    which transformers does not read.

    Args:
        config: the wrapper's config, of which `build_on_meta` made a model.
        family: its family.
        files: the model's weights, renamed by `rename_tensors`.
    """
    if files.apart is None:
        return
    with torch.device("meta"):
        whole = cast(PreTrainedModel, family.model_class(config))
    names, held = ParameterNames(whole), files.apart.tensors
    stored_names = {names.parameter_name(stored): stored for stored in held}
    absent = absent_parts(family, files)
    expected = tuple(f"{part}." for part in family.unbuilt_parts() if _last(part) not in absent)
    for name, parameter in whole.named_parameters():
        if not name.startswith(expected):
            continue
        stored = stored_names.get(name, name)
        # A header does not have the shape of a packed weight.
        if stored not in held or f"{stored}.absmax" not in held:
            files.apart.check_shape(stored, tuple(parameter.shape))


def absent_parts(family: Family, files: WeightHeaders) -> list[str]:
    """Return the last names of the parts that are not built and of which the files hold no tensor."""
    held = files.apart.tensors if files.apart else {}
    segments = {segment for stored in held for segment in stored.split(".")}
    return [_last(part) for part in family.unbuilt_parts() if _last(part) not in segments]


def _last(part: str) -> str:
    """Return the name of a part in any spelling of the files, vision_tower for model.vision_tower."""
    return part.rpartition(".")[2]
