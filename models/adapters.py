"""Puts a method's layers into a meta model, and decides what is trained.

The order matters: dtypes and the freeze first, then 4-bit linears, then adapters around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from files.model_folder import CheckpointFiles
from files.names import CONFIG
from launch.precision import Precision
from models.dora import DoRALinear
from models.family import Family
from models.llama_pro import new_layers
from models.lora import LoRALinear
from models.moe import within_experts
from options.config import Config
from options.errors import UserError
from quantization.layer import Linear4bit, quantize_linears
from quantization.quantizers import Quantizer
from quantization.registry import make_quantizer

# By the name that METHODS gives them.
ADAPTERS: dict[str, type[LoRALinear]] = {"lora": LoRALinear, "dora": DoRALinear}


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


def check_rank(model: nn.Module, names: list[str], rank: int) -> None:
    """Raises UserError for a rank that is beyond all of the linears that get an adapter."""
    linears = dict(_dense_linears(model, names))
    most = max(max(linear.in_features, linear.out_features) for linear in linears.values())
    if rank > most:
        raise UserError(f"--lora_rank {rank}: no linear has more than {most} features")


def _dense_linears(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Linear]]:
    """The named linears of a model that no method has changed."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        yield name, linear


def peft_targets(family: Family, wanted: str) -> list[str]:
    """--lora_target_modules as the names that PEFT's target_modules would hold."""
    if wanted == "all":
        return [linear.rpartition(".")[2] for linear in family.linears]
    return list(family.default_targets) if wanted == "default" else [p.strip() for p in wanted.split(",")]


def check_packing(model: PreTrainedModel, family: Family, config: Config, files: CheckpointFiles) -> None:
    """Raises UserError if a linear cannot be packed, or if the checkpoint is packed and may not be, or says so alone."""
    linears = dict(family.layer_linears(model))
    if getattr(model.config, "quantization_config", None) and not files.prequantized:
        # Saved with such a config.json, a trained model would be one that transformers cannot compute.
        raise UserError(
            f"{files.folder}/{CONFIG}: quantization_config says that the weights are packed, but no file holds one"
            " that is; if they are the original weights, delete it"
        )
    if files.prequantized and config.method.quantizer != "bnb":
        raise UserError(
            f"{files.folder}: is packed by bitsandbytes already, which --train_type {config.train_type} cannot"
            " train on; use qlora or bnb_dora, or the original weights"
        )
    if files.prequantized and config.quantized_cache:
        raise UserError(f"--quantized_cache: {files.folder} is packed already; leave the option out")
    for name in files.packed:
        if name.removesuffix(".weight") not in linears:
            raise UserError(f"{files.folder}: {name} is packed; only linears of decoder layers can be")
    if not config.method.quantizer or files.prequantized:
        return
    quantizer = make_quantizer_of(config)
    for name, linear in _dense_linears(model, linears):
        if not quantizer.fits(tuple(linear.weight.shape)):
            raise UserError(
                f"--group_size {quantizer.block}: does not divide {name}'s weight {list(linear.weight.shape)}"
            )
    for name in packed_linears(model, family, config):
        stored = files.tensors[f"{name}.weight"]
        if stored.dtype not in quantizer.dtypes:
            raise UserError(
                f"{files.folder / stored.file}: {name}.weight is stored as {stored.dtype}, which {quantizer.library}"
                " does not pack; convert it to 32 or 16 bits"
            )


def make_quantizer_of(config: Config) -> Quantizer:
    name = config.method.quantizer
    assert name is not None
    return make_quantizer(name, config.n_bits, config.group_size)


def packed_linears(model: PreTrainedModel, family: Family, config: Config) -> list[str]:
    """The linears that are packed: all of the decoder layers, but not of Llama-Pro's new ones."""
    new = new_layers(model.config) if config.method.expansion else []
    return [name for name, _ in family.layer_linears(model) if family.locate_layer(name)[0] not in new]


def choose_quantizers(names: list[str], config: Config, files: CheckpointFiles) -> dict[str, Quantizer]:
    """How each linear is packed; those that are not named stay dense. In a checkpoint that is packed already
    that is as its makers chose."""
    if files.prequantized:
        packed = {name: files.packed.get(f"{name}.weight") for name in names}
        return {name: weight.quantizer for name, weight in packed.items() if weight}
    return dict.fromkeys(names, make_quantizer_of(config))


def apply_method(
    model: PreTrainedModel, family: Family, config: Config, precision: Precision, files: CheckpointFiles
) -> None:
    """Turns transformers' meta model into what the train type trains; afterwards exactly its parameters
    have requires_grad. Every parameter gets its dtype of `precision`."""
    method = config.method
    new = new_layers(model.config) if method.expansion else []
    trained = [model.get_submodule(f"{family.layers}.{i}") for i in new]
    if not method.adapter and not method.expansion:
        trained = [model]
    model.to(precision.frozen).requires_grad_(False)  # type: ignore[arg-type]
    for part in trained:
        part.to(precision.trained).requires_grad_(True)
    if method.quantizer:
        names = packed_linears(model, family, config)
        quantize_linears(model, choose_quantizers(names, config, files), precision.matmul_dtype)
    if method.adapter:
        _put_adapters(model, family, config, precision.trained)


def _put_adapters(model: nn.Module, family: Family, config: Config, dtype: torch.dtype) -> None:
    kind = config.method.adapter
    assert kind is not None
    adapter = ADAPTERS[kind]
    for name in target_linears(model, family, config.lora_target_modules):
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear | Linear4bit)
        size = (base.out_features, base.in_features)
        options = (size, config.lora_rank, config.lora_alpha, config.lora_dropout, dtype)
        model.set_submodule(name, adapter(base, *options))


@torch.no_grad()
def exchange_adapters(model: nn.Module, family: Family, config: Config) -> None:
    """Puts adapters with the options of `config`, not yet filled, in the place of those of a loaded model that is
    not sharded; its base stays where it is."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.released())
    _put_adapters(model, family, config, torch.float32)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.eval().requires_grad_(False)
        if isinstance(module, DoRALinear):
            module.squared_norm.copy_(module.norm_of(module.base.weight))
