"""Puts a method's layers into a meta model, and decides what is trained.

The order matters: the dtype first, then 4-bit linears, then adapters around them, then the freeze.
"""

from __future__ import annotations

import torch
from torch import nn

from config import Config, UserError
from models.dora import DoRALinear
from models.family import Family
from models.lora import LoRALinear
from models.moe import within_experts
from quantize_layers import quantize_linears


def target_linears(model: nn.Module, family: Family, wanted: str) -> list[str]:
    """Absolute names of the linears that get an adapter. wanted: as --lora_target_modules.

    A name matches whole dotted segments at the end: q_proj, self_attn.q_proj. Raises UserError if one
    matches nothing, or a linear of a routed expert.
    """
    names = [name for name, _ in family.layer_linears(model)]
    chosen = set()
    for pattern in peft_targets(family, wanted):
        hits = [n for n in names if pattern and f".{n}".endswith(f".{pattern}")]
        known = ", ".join(dict.fromkeys(linear.rpartition(".")[2] for linear in family.linears))
        if any(within_experts(model, n) for n in hits):
            raise UserError(
                f"--lora_target_modules: {pattern!r} names linears of experts, which get no adapter: PEFT has no"
                f" module for a single expert; known: {known}"
            )
        if not hits:
            raise UserError(
                f"--lora_target_modules: {pattern!r} matches no linear of this model; known: {known}"
            )
        chosen.update(hits)
    return [n for n in names if n in chosen]


def peft_targets(family: Family, wanted: str) -> list[str]:
    """--lora_target_modules as the names that PEFT's target_modules would hold."""
    if wanted == "all":
        return [linear.rpartition(".")[2] for linear in family.linears]
    return list(family.default_targets) if wanted == "default" else [p.strip() for p in wanted.split(",")]


def apply_method(
    model: nn.Module, family: Family, config: Config, compute_dtype: torch.dtype, trained_dtype: torch.dtype
) -> None:
    """Turns transformers' meta model into what the train type trains; afterwards exactly its parameters
    have requires_grad. Frozen parameters get compute_dtype, trained ones trained_dtype."""
    method = config.method
    model.to(trained_dtype if method.saves == "model" else compute_dtype)
    if method.quantizer:
        quantize_linears(model, [name for name, _ in family.layer_linears(model)], compute_dtype)
    model.requires_grad_(method.adapter is None)
    if method.adapter is None:
        return
    adapter = {"lora": LoRALinear, "dora": DoRALinear}[method.adapter]
    sizes = {name: (m.out_features, m.in_features) for name, m in family.layer_linears(model)}
    for name in target_linears(model, family, config.lora_target_modules):
        options = (sizes[name], config.lora_rank, config.lora_alpha, config.lora_dropout, trained_dtype)
        model.set_submodule(name, adapter(model.get_submodule(name), *options))
