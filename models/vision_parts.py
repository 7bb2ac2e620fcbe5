"""What a run does with the vision parts of its model: --vision_targets and --vision_bits.

All functions find nothing if the model is built without these parts.
"""

from __future__ import annotations

from torch import nn

from launch.precision import Precision
from models.family import Family
from options.config import Config
from options.errors import UserError

_ONLY_LORA = (
    "this model's is a bare matrix, which PEFT adapts by LoRA alone (lora, qlora, hqq_lora), without"
    " --lora_dropout"
)


def vision_linears(model: nn.Module, family: Family) -> list[str]:
    """Return the names of the linears of the tower's blocks."""
    vision = family.built_vision()
    return list(vision.block_linears(model)) if vision else []


def all_vision_linears(model: nn.Module, family: Family) -> list[str]:
    """Return the names of all linears that may have an adapter: `vision_linears`, and the projector's."""
    vision = family.built_vision()
    return [*vision_linears(model, family), *(vision.projector_linears(model) if vision else ())]


def packed_vision_linears(model: nn.Module, family: Family, config: Config, prequantized: bool) -> list[str]:
    """Return the names of the linears that --vision_bits packs, or that may be packed in the files.

    Args:
        model: the model; it may be on meta.
        family: its family.
        config: the run's options.
        prequantized: whether the files are packed already.
    """
    return vision_linears(model, family) if prequantized or config.vision_bits == 4 else []


def vision_targets(model: nn.Module, family: Family, config: Config) -> list[str]:
    """Return the names of the linears that --vision_targets adapts."""
    if config.vision_targets == "all":
        return all_vision_linears(model, family)
    vision = family.built_vision()
    return list(vision.projector_linears(model)) if vision and config.vision_targets == "projector" else []


def vision_matrices(family: Family, config: Config) -> list[str]:
    """Return the names of the bare matrices of the projector that --vision_targets adapts.

    PEFT has only LoRA for a parameter that is no linear's (target_parameters): no DoRA, and no dropout.
    """
    vision = family.built_vision()
    is_asked = config.vision_targets in ("projector", "all")
    can_adapt = config.method.adapter == "lora" and not config.lora_dropout
    return list(vision.matrices) if vision and is_asked and can_adapt else []


def describe_left_matrices(family: Family, config: Config) -> str:
    """Return a line if `all` leaves out a bare matrix, which the run's adapter does not fit; else ""."""
    vision = family.built_vision()
    is_asked = config.vision_targets == "all" and config.method.adapter
    if not vision or not vision.matrices or not is_asked or vision_matrices(family, config):
        return ""
    return f"--vision_targets all: adapts the tower; the projector stays as it is: {_ONLY_LORA}"


def check_vision_options(family: Family, config: Config, prequantized: bool) -> None:
    """Raise UserError for --vision_targets or --vision_bits that have no effect on the model.

    Args:
        family: the model's family.
        config: the run's options.
        prequantized: whether the files are packed already.
    """
    vision = family.built_vision()
    given = [("vision_targets", config.vision_targets, "none"), ("vision_bits", config.vision_bits, 16)]
    for name, value, default in given:
        if vision is None and value not in (None, default):
            raise UserError(f"--{name} {value}: has no effect without images; leave it out")
    is_adaptable = vision and (vision.projector or vision_matrices(family, config))
    if vision and config.vision_targets == "projector" and not is_adaptable:
        raise UserError(
            f"--vision_targets projector: {_ONLY_LORA}; choose all, for the linears of the tower, or none"
        )
    if prequantized and config.vision_bits == 4:
        raise UserError("--vision_bits 4: the weights are packed already, as they are; leave it out")


def freeze_vision(model: nn.Module, family: Family, precision: Precision) -> None:
    """Freeze the vision parts, with their linears in the dtype of matmuls: 16 bits under autocast, too.

    The tower's stream of hidden states has the dtype of the rest, its embeddings and norms.
    """
    vision = family.built_vision()
    for part in vision.parts if vision else ():
        model.get_submodule(part).to(precision.frozen).requires_grad_(False)
    for name in vision_linears(model, family):
        model.get_submodule(name).to(precision.matmul_dtype)
