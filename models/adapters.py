"""Change a meta model into what the train type trains: dtypes, frozen weights, 4-bit linears, adapters.

The order matters: dtypes and the freeze first, then stacks of experts and 4-bit linears, then the adapters
that wrap them; last, what fp16 computes with a larger range.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from files.config_parts import find_quantization, text_config
from files.names import CONFIG
from files.quantized_releases import packed_expansion_error, suggest_original
from files.weight_headers import WeightHeaders
from launch.precision import Precision
from models.dora import DoRALinear
from models.expert_adapters import EXPERT_ADAPTERS, StackedDoRA
from models.experts import check_packed_alike, expert_prefixes, stack_experts
from models.family import Family
from models.llama_pro import new_layers
from models.lora import LoRALinear, LowRankModule
from models.peft_names import peft_targets
from models.routers import cast_in_forward, find_routers
from models.vision_parts import (
    check_vision_options,
    freeze_vision,
    packed_vision_linears,
    vision_linears,
    vision_matrices,
    vision_targets,
)
from models.vocabulary import vocabulary_modules
from models.wide_linears import find_wide_linears, widen_linears
from options.config import Config
from options.errors import UserError
from quantization.layer import Linear4bit, quantize_linears, round_matmuls
from quantization.quantizers import Quantizer
from quantization.registry import make_quantizer
from quantization.stacked import StackedLinear, StackedLinear4bit

# Keys are the adapter names of METHODS.
ADAPTERS: dict[str, type[LoRALinear]] = {"lora": LoRALinear, "dora": DoRALinear}


def target_linears(model: nn.Module, family: Family, target_modules: str) -> list[str]:
    """Return full names of the linears that --lora_target_modules selects; UserError if a pattern fits none.

    A pattern matches whole dotted segments at the end of a name: q_proj, self_attn.q_proj. Raises UserError
    if a pattern matches nothing, or a linear of a routed expert. target_modules: the option's value.
    """
    names, in_experts = list(family.layer_linear_names(model)), expert_prefixes(model)
    matched = set()
    for pattern in peft_targets(family, target_modules):
        matches = [n for n in names if pattern and f".{n}".endswith(f".{pattern}")]
        known = ", ".join(dict.fromkeys(linear.rpartition(".")[2] for linear in family.linears))
        if any(name.startswith(in_experts) for name in matches):
            raise UserError(
                f"--lora_target_modules: {pattern!r} names linears of experts, which get no adapter:"
                f" PEFT has no module for a single expert; known: {known}"
            )
        if not matches:
            raise UserError(
                f"--lora_target_modules: {pattern!r} matches no linear of this model; known: {known}"
            )
        matched.update(matches)
    return [n for n in names if n in matched]


def adapted_linears(model: nn.Module, family: Family, config: Config) -> list[str]:
    """Return full names of the linears that get adapters; [] if the train type has none.

    They are those of --lora_target_modules and of --vision_targets. Raises UserError as `target_linears`.
    """
    if not config.method.adapter:
        return []
    return target_linears(model, family, config.lora_target_modules) + vision_targets(model, family, config)


def check_rank(model: nn.Module, names: list[str], rank: int, option: str = "lora_rank") -> None:
    """Raise UserError if a rank exceeds both in_features and out_features of every named linear.

    option: the rank's option.
    """
    linears = dict(_dense_linears(model, names))
    widest = max(max(linear.in_features, linear.out_features) for linear in linears.values())
    if rank > widest:
        raise UserError(f"--{option} {rank}: no linear has more than {widest} features")


def check_expert_adapters(model: nn.Module, family: Family, config: Config) -> None:
    """Raise UserError if the model cannot have the adapters of --lora_expert_rank, or has no routers."""
    rank = config.lora_expert_rank
    if config.train_router and not expert_prefixes(model):
        raise UserError("--train_router: the model has no routed experts, and so no router; leave it out")
    if not rank:
        return
    if not expert_prefixes(model):
        raise UserError(f"--lora_expert_rank {rank}: the model has no routed experts; leave it out")
    if config.lora_dropout:
        raise UserError(
            f"--lora_dropout {config.lora_dropout}: adapters on experts have no dropout, as in PEFT; leave"
            " one of --lora_dropout and --lora_expert_rank out"
        )
    check_rank(model, [f"{prefix}0.gate_proj" for prefix in expert_prefixes(model)], rank, "lora_expert_rank")


def describe_expert_dora(config: Config) -> str:
    """Return a line if the run's adapter has DoRA on experts, which PEFT has not; else ""."""
    if not config.lora_expert_rank or config.method.adapter != "dora":
        return ""
    return (
        f"--lora_expert_rank {config.lora_expert_rank}: PEFT has no DoRA on experts, and refuses this run's"
        " adapter; generate.py takes it, and `export.py --to merged` merges it"
    )


def _dense_linears(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield (name, module) for each name: plain nn.Linear, in a model that `apply_method` did not change."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        yield name, linear


def check_quantization(model: PreTrainedModel, family: Family, config: Config, files: WeightHeaders) -> None:
    """Raise UserError if the train type cannot pack the files' weights, or use those packed already.

    Args:
        model: from `build_on_meta`, before `apply_method` changes it.
        family: the model's family.
        config: the run's options: train type, quantizer settings and --quantized_cache.
        files: the model's weights, of which only names and dtypes are read.
    """
    check_vision_options(family, config, files.prequantized)
    if find_quantization(model.config) and not files.prequantized:
        # A trained model saved with such a config.json could not be computed by transformers.
        raise UserError(
            f"{files.folder}/{CONFIG}: quantization_config says that the weights are packed, but no file"
            " holds a packed weight; if they are the original weights, delete it"
        )
    if files.prequantized and config.method.expansion:
        raise packed_expansion_error(files.folder)
    if files.prequantized and config.method.quantizer != "bnb":
        raise UserError(
            f"{files.folder}: is packed by bitsandbytes already, which --train_type {config.train_type}"
            f" cannot train on; use qlora or bnb_dora, or {suggest_original(files.folder)}"
        )
    if files.prequantized and config.quantized_cache:
        raise UserError(f"--quantized_cache: {files.folder} is packed already; leave the option out")
    packable = {*family.layer_linear_names(model), *vision_linears(model, family)}
    for name in files.packed:
        if name.removesuffix(".weight") not in packable and name not in files.dequantized:
            tower = " and of the vision tower's blocks" if family.has_images else ""
            raise UserError(
                f"{files.folder}: {files.stored_name(name)} is packed; only weights of decoder layers{tower}"
                f" can be: {suggest_original(files.folder)}"
            )
    if files.prequantized:
        packed = choose_quantizers(packed_linears(model, family, config, files), config, files)
        check_packed_alike(model, packed, str(files.folder))
    if not config.method.quantizer or files.prequantized:
        return
    quantizer = quantizer_from_config(config)
    names = packed_linears(model, family, config, files)
    for name, linear in _dense_linears(model, names):
        if not quantizer.can_pack(tuple(linear.weight.shape)):
            shape = list(linear.weight.shape)
            raise UserError(f"--group_size {quantizer.block}: does not divide {name}'s weight {shape}")
    for name in names:
        stored = files.tensors[f"{name}.weight"]
        if stored.dtype not in quantizer.dtypes:
            raise UserError(
                f"{files.folder / stored.file}: {name}.weight is stored as {stored.dtype},"
                f" which {quantizer.library} does not pack; convert it to 32 or 16 bits"
            )


def quantizer_from_config(config: Config) -> Quantizer:
    """Return the quantizer of --train_type, which must have one, made with --n_bits and --group_size."""
    name = config.method.quantizer
    assert name is not None
    return make_quantizer(name, config.n_bits, config.group_size)


def packed_linears(model: PreTrainedModel, family: Family, config: Config, files: WeightHeaders) -> list[str]:
    """Return the names of the linears to pack: those of all decoder layers but Llama-Pro's new ones.

    Those of the vision tower belong to them with --vision_bits 4, and if the files are packed already.
    """
    new = new_layers(model.config) if config.method.expansion else []
    names = [name for name in family.layer_linear_names(model) if family.locate_layer(name)[0] not in new]
    return names + packed_vision_linears(model, family, config, files.prequantized)


def choose_quantizers(names: list[str], config: Config, files: WeightHeaders) -> dict[str, Quantizer]:
    """Return {linear's name: its quantizer}, for the given names; linears without an entry stay unquantized.

    All get the train type's quantizer. In a checkpoint that is packed already, each packed one gets its own.
    """
    if files.prequantized:
        packed = {name: files.packed.get(f"{name}.weight") for name in names}
        return {name: weight.quantizer for name, weight in packed.items() if weight}
    return dict.fromkeys(names, quantizer_from_config(config))


def apply_method(
    model: PreTrainedModel, family: Family, config: Config, precision: Precision, files: WeightHeaders
) -> None:
    """Cast, freeze and quantize a meta model in place, and add its adapters, as the train type says.

    Afterwards exactly the trained parameters have requires_grad, and all have the dtypes of `precision`, but
    for those that are fixed (`Family.fixed_parameters`), which are fp32.

    Args:
        model: from `build_on_meta`; changed in place.
        family: the model's family.
        config: the run's options: train type, quantizer and adapter settings.
        precision: dtypes of frozen and trained weights, and of matmuls.
        files: the model's weights; if they are packed already, each packed linear keeps its own quantizer.
    """
    method = config.method
    wide = find_wide_linears(model, family) if precision.autocast == torch.float16 else []
    new = new_layers(model.config) if method.expansion else []
    trained = [model.get_submodule(f"{family.layers}.{i}") for i in new]
    if not method.adapter and not method.expansion:
        trained = [model]
    routers = list(find_routers(model).values()) if config.train_router else []
    if config.train_embeddings:
        trained = list(vocabulary_modules(model, family).values())
    trained += routers
    model.to(precision.frozen).requires_grad_(False)  # type: ignore[arg-type]
    for module in trained:
        module.to(precision.trained).requires_grad_(True)
    family.set_fixed_parameters(model, torch.Tensor.float)
    for router in routers:
        cast_in_forward(router, precision.frozen)
    freeze_vision(model, family, precision)
    quantizers: dict[str, Quantizer] = {}
    if method.quantizer:
        names = packed_linears(model, family, config, files)
        quantizers = choose_quantizers(names, config, files)
    quantizers = stack_experts(model, quantizers, precision.matmul_dtype)
    quantize_linears(model, quantizers, precision.matmul_dtype)
    changed = family.changed_results(text_config(model.config))
    for name in quantizers:
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear4bit)
        linear.copies_result = family.locate_layer(name)[1] in changed
    round_base_matmuls(model, family, config.base_matmul)
    if method.adapter:
        _add_adapters(model, family, config, precision.trained)
    widen_linears(model, wide)


def round_base_matmuls(
    model: nn.Module, family: Family, base_matmul: str | None, in_evaluation: bool = False
) -> None:
    """Let the packed linears of the decoder layers whose shape fits multiply as --base_matmul says.

    in_evaluation: also in evaluation mode.
    """
    if base_matmul is None or base_matmul == "16bit":
        return
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    inside = {name: linear for name, linear in linears.items() if family.locate_layer(name)[0] is not None}
    round_matmuls(inside, base_matmul, in_evaluation)


def _add_adapters(model: nn.Module, family: Family, config: Config, dtype: torch.dtype) -> None:
    """Wrap the run's `adapted_linears`, and stacks of experts, in the train type's adapters.

    dtype: of A, B and magnitudes.
    """
    name = config.method.adapter
    assert name is not None
    for path in adapted_linears(model, family, config):
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear | Linear4bit)
        size = (base.out_features, base.in_features)
        options = (size, config.lora_rank, config.lora_scaling, config.lora_dropout, dtype)
        model.set_submodule(path, ADAPTERS[name](base, *options))
    for path, module in list(model.named_modules()) if config.lora_expert_rank else ():
        if isinstance(module, StackedLinear | StackedLinear4bit):
            rank, scaling = config.lora_expert_rank, config.expert_scaling
            alternates = family.stacks_experts and module.parts > 1
            model.set_submodule(path, EXPERT_ADAPTERS[name](module, rank, scaling, dtype, alternates))
    vision = family.built_vision()
    for matrix in vision_matrices(family, config):
        assert vision is not None
        path, adapt = matrix.rpartition(".")[0], vision.matrices[matrix]
        base = model.get_submodule(path)
        model.set_submodule(path, adapt(base, config.lora_rank, config.lora_scaling, dtype))


@torch.no_grad()
def replace_adapters(model: nn.Module, family: Family, config: Config) -> None:
    """Replace the adapters of a loaded, unsharded model by new ones of `config`'s options, not filled yet.

    The base stays loaded. The caller must set the new A, B and magnitudes.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankModule):
            model.set_submodule(name, module.unwrap_base())
    _add_adapters(model, family, config, torch.float32)
    for module in model.modules():
        if isinstance(module, LowRankModule):
            module.eval().requires_grad_(False)
        if isinstance(module, DoRALinear):
            module.squared_norm.copy_(module.compute_squared_norm(module.base.weight))
        if isinstance(module, StackedDoRA):
            norms = module.compute_squared_norm(module.base.members())
            module.squared_norm.copy_(norms.view_as(module.squared_norm))
