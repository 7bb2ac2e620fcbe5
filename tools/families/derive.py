"""Derive the Family of a model by looking at its modules and by experiments with them.

An experiment changes a copy of a module, calls it again with the arguments of a recorded forward pass, and
looks at the result: a projection whose zeros make the result of the MLP zero is its last one; norms whose
zeros make a layer the identity are those of `identity_init`.

Raises UserError for a model that no Family can describe.
"""

from __future__ import annotations

import copy
from typing import cast

import peft.utils.constants as peft_constants
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from models.family import Family
from options.errors import UserError
from tools.families.calls import Call, is_close, record_calls
from tools.families.draft import Draft
from tools.families.settings import find_attention, find_buffers, find_compiles, find_logits, find_norm

PEFT_TARGETS = peft_constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
USUAL_TARGETS = ("q_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv", "c_attn")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def derive(model: PreTrainedModel) -> Draft:
    """Return what was found of a tiny model of transformers, in fp32 and evaluation mode.

    Raises UserError if it has no list of decoder layers, no rotary embedding outside of them, or no plain
    embedding and head.
    """
    calls, logits = record_calls(model)
    config = model.config.get_text_config()
    layers = _find_layers(model, config)
    rotary = _find_rotary(model, layers)
    module = type(model).__module__
    draft = Draft(config.model_type, module, type(model).__name__, type(model.get_submodule(rotary)).__name__)
    if type(model.get_submodule(rotary)).__module__ != module:
        draft.missing.append(
            f"import {draft.rotary_class} from {type(model.get_submodule(rotary)).__module__}"
        )
    _find_unused(model, calls, draft)
    _find_linears(model, layers, calls, draft)
    find_attention(model, logits, draft)
    find_buffers(model, rotary, config, draft)
    find_compiles(calls, layers, draft)
    find_logits(model, logits, config, draft)
    draft.set("layers", layers)
    draft.set("embedding", _name_of(model, model.get_input_embeddings(), nn.Embedding, "embedding"))
    draft.set("norm", find_norm(model, calls, draft))
    draft.set("head", _name_of(model, model.get_output_embeddings(), nn.Linear, "head"))
    draft.set("rotary", rotary)
    return draft


def _find_layers(model: nn.Module, config: PretrainedConfig) -> str:
    """Return the name of the list of decoder layers: the largest of as many modules as there are layers."""
    count = config.num_hidden_layers
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if not sizes:
        raise UserError(f"{type(model).__name__} has no list of {count} decoder layers")
    return max(sizes, key=lambda name: sizes[name])


def _find_rotary(model: nn.Module, layers: str) -> str:
    """Return the name of the rotary embedding, which is outside of the layers."""
    found = [
        name
        for name, module in model.named_modules()
        if "rotary" in type(module).__name__.lower() and not name.startswith(f"{layers}.")
    ]
    beside = [name for name in found if name.rpartition(".")[0] == layers.rpartition(".")[0]]
    if not beside:
        raise UserError(
            f"{type(model).__name__} has no rotary embedding beside its layers, which each family needs:"
            " positions of other kinds are not built here"
        )
    return beside[0]


def _name_of(model: nn.Module, module: object, kind: type[nn.Module], part: str) -> str:
    if not isinstance(module, kind):
        raise UserError(f"{type(model).__name__}: its {part} is {type(module).__name__}, not {kind.__name__}")
    return next(name for name, other in model.named_modules() if other is module)


def _find_unused(model: PreTrainedModel, calls: list[Call], draft: Draft) -> None:
    """Name the parts of a wrapper that a forward pass on text does not call, such as a vision tower."""
    prefix = model.base_model_prefix
    called = {name.split(".")[1] for name in (call.name for call in calls) if name.startswith(f"{prefix}.")}
    parts = {name.partition(".")[0] for name, _ in model.base_model.named_parameters()}
    unused = sorted(f"{prefix}.{part}" for part in parts - called)
    if unused:
        draft.missing.append(
            f"{draft.model_class} is a wrapper of {draft.model_type}, and text does not need"
            f" {', '.join(unused)}: try {draft.model_type}, or write wrap_family (models/gemma3.py is an"
            " example)"
        )


# Layers


def _find_linears(model: nn.Module, layers: str, calls: list[Call], draft: Draft) -> None:
    """Set linears, sublayers, outputs, identity_init and default_targets."""
    modules = model.get_submodule(layers)
    assert isinstance(modules, nn.ModuleList)
    config = cast(PretrainedConfig, model.config).get_text_config()
    routers = {1, *(getattr(config, name, None) for name in EXPERT_COUNTS)}
    linears, *others = [_linears_of(layer, routers) for layer in modules]
    if any(set(names) != set(linears) for names in others):
        draft.missing.append(
            "the layers have different linears: write select_linears (models/qwen3_moe.py is an example)"
        )
    stacked = [n for n, p in modules[-1].named_parameters() if p.dim() > 2]
    if stacked:
        draft.missing.append(
            f"routed experts are stacked ({', '.join(stacked)}): write match_checkpoint and select_linears"
            " (models/qwen3_moe.py is an example)"
        )
    call = next(c for c in calls if c.name == f"{layers}.0")
    inner = {c.name.removeprefix(f"{call.name}."): c for c in calls if c.name.startswith(f"{call.name}.")}
    units = [name for name in inner if any(n == name or n.startswith(f"{name}.") for n in linears)]
    units = sorted(dict.fromkeys(n.partition(".")[0] for n in units), key=lambda n: "att" not in n)
    outputs = tuple(name for unit in units for name in _last_linears(unit, inner[unit], inner, linears))
    called = [*inner]
    linears.sort(key=lambda n: (units.index(n.partition(".")[0]), called.index(n)))
    draft.set("linears", tuple(linears))
    _find_changed_results(linears, inner, draft)
    targets = _default_targets(draft.model_type, linears)
    draft.set("default_targets", targets)
    if draft.model_type not in PEFT_TARGETS:
        draft.remarks.append(f"PEFT has no default targets for {draft.model_type}: here {', '.join(targets)}")
    draft.set("sublayers", tuple(units))
    draft.set("outputs", outputs)
    _find_identity(call, units, inner, outputs, draft)


def _linears_of(layer: nn.Module, routers: set) -> list[str]:
    """Return the names of a layer's linears. routers: numbers of features of linears that are left out."""
    return [
        name
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and module.out_features not in routers
    ]


def _last_linears(unit: str, call: Call, inner: dict[str, Call], linears: list[str]) -> list[str]:
    """Return the linear whose zeros make the unit's result zero: the one that is called last."""
    names = [n for n in inner if n in linears and (n == unit or n.startswith(f"{unit}."))]
    for name in reversed(names):
        changed = copy.deepcopy(call.module)
        _fill(changed.get_submodule(name.removeprefix(unit).removeprefix(".")), 0.0)
        if not call.repeat(changed).any():
            return [name]
    return []


def _find_changed_results(linears: list[str], inner: dict[str, Call], draft: Draft) -> None:
    """Set changed_results: linears whose recorded results are not what the linear returns."""
    calls = {name: inner[name] for name in linears if name in inner}
    changed = [name for name, call in calls.items() if not is_close(call.repeat(), cast(Tensor, call.result))]
    if changed:
        names = ", ".join(f'"{name}"' for name in changed)
        draft.settings["changed_results"] = f"lambda config: ({names}{',' * (len(changed) == 1)})"


def _fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def _find_identity(
    call: Call, units: list[str], inner: dict[str, Call], outputs: tuple[str, ...], draft: Draft
) -> None:
    """Set identity_init if norms follow the units, and check that a layer then computes nothing."""
    results = [inner[unit].result for unit in units]
    norms = {
        name: _silent_value(c.module)
        for name, c in inner.items()
        if "norm" in type(c.module).__name__.lower() and any(c.input is result for result in results)
    }
    silent = norms or dict.fromkeys(outputs, 0.0)
    layer = copy.deepcopy(call.module)
    for name, value in silent.items():
        _fill(layer.get_submodule(name), value)
    assert call.input is not None
    if not silent or not torch.equal(call.repeat(layer), call.input):
        draft.missing.append(
            f"Llama-Pro: a layer is not the identity with zeros in {', '.join(silent) or 'no module'}; write"
            " identity_init"
        )
    elif norms:
        draft.set("identity_init", tuple(norms.items()))


def _silent_value(norm: nn.Module) -> float:
    """Return the weight with which a norm's result is zero: 0, or -1 if it multiplies by 1 + weight."""
    weight = next(norm.parameters(), None)
    return -1.0 if weight is not None and weight.mean().abs() < 0.5 else 0.0


def _default_targets(model_type: str, linears: list[str]) -> tuple[str, ...]:
    """Return PEFT's default targets for the type, or those that hold queries and values."""
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    targets = tuple(n for n in PEFT_TARGETS.get(model_type, ()) if n in last)
    return targets or tuple(n for n in last if n in USUAL_TARGETS) or tuple(last[:1])


def describe_differences(found: Family, known: Family, config: PretrainedConfig) -> list[str]:
    """Return how a family that was found differs from the one of the registry, attribute by attribute.

    Functions of the config are compared by their results. Functions of modules are not compared, nor
    `wide_linears`, which only a trained model's activations show.
    """
    lines = []
    for name in vars(known):
        ours, theirs = getattr(found, name), getattr(known, name)
        if name in ("changed_results", "logit_scale", "logit_cap", "constant_buffers"):
            ours, theirs = ours(config), theirs(config)
        if ours != theirs and name not in ("select_linears", "match_checkpoint", "wide_linears"):
            lines.append(f"{name}: {ours} instead of {theirs}")
    return lines
