"""Writes the trained adapter in PEFT's format, and loads such an adapter into a model.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from files.atomic_writes import stage_files
from files.base_model import BaseModel
from files.disk_room import check_free_space
from files.names import ADAPTER, ADAPTER_CONFIG
from files.saved_adapter import ADAPTER_DTYPES, PEFT_PREFIX, TensorHeaders, read_adapter_modules
from files.tensors import save_tensors
from models.family import Family, unwrapped_name
from models.lora import LowRankModule
from models.peft_names import (
    peft_exclusions,
    peft_full_modules,
    peft_rank_pattern,
    peft_target_modules,
    peft_target_parameters,
)
from models.routers import router_parameters
from models.vocabulary import vocabulary_parameters
from options.config import Config
from options.errors import UserError
from parallel.shards import fill_shard, full_tensor, gather_to_cpu
from quantization.dora_operators import TINY

MAGNITUDE = "lora_magnitude_vector"  # the end of a tensor's name


def save_adapter(
    model: PreTrainedModel,
    folder: Path,
    config: Config,
    base: BaseModel,
    family: Family,
    extra_files: Mapping[str, str],
) -> str:
    """Write adapter_model.safetensors, adapter_config.json and extra_files. Collective; rank 0 writes.

    Returns `zero_rows_remark` on rank 0, "" on others. Raises OSError on rank 0, after the last collective.

    Args:
        base: The base model.
        family: The model's family.
        extra_files: {name: text} of more files to write.
    """
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, LowRankModule):
            prefix = f"{PEFT_PREFIX}{module.peft_path(unwrapped_name(path))}"
            for name, full in module.peft_tensors(gather_to_cpu).items():
                if dist.get_rank() == 0:
                    tensors[f"{prefix}.{name}"] = full.contiguous()
    if config.train_embeddings:
        tensors |= _gather_vocabulary(model, family)
    for name, parameter in router_parameters(model).items() if config.train_router else ():
        full = gather_to_cpu(parameter)
        if dist.get_rank() == 0:
            tensors[f"{PEFT_PREFIX}{name}"] = full.contiguous()
    if dist.get_rank() != 0:
        return ""
    check_free_space(folder, sum(t.nbytes for t in tensors.values()))
    with stage_files(folder) as stage:
        save_tensors(tensors, stage(ADAPTER), base.metadata())
        for name, text in extra_files.items():
            stage(name).write_text(text, encoding="utf-8")
        stage(ADAPTER_CONFIG).write_text(
            json.dumps(_adapter_config(model, config, base, family), indent=2) + "\n", encoding="utf-8"
        )
    return zero_rows_remark(tensors)


def zero_rows_remark(tensors: Mapping[str, Tensor]) -> str:
    """Return a remark if a DoRA adapter belongs to weights with rows of zeros, else "".

    The norm of such a row is 0. Here it has a floor (models/dora.py); PEFT divides 0 by 0.
    tensors: the adapter's, by PEFT's names.
    """
    rows = 0
    for name, magnitude in tensors.items():
        if name.endswith(MAGNITUDE) and magnitude.dim() == 1:  # PEFT has no DoRA on experts
            b = tensors[name.removesuffix(MAGNITUDE) + "lora_B.weight"]
            rows += int(((magnitude.square() <= 2 * TINY) & (b == 0).all(1)).sum())
    if not rows:
        return ""
    return (
        f"adapter: {rows:,} rows of the base's weights are zeros; PEFT's DoRA gives NaN over them."
        " generate.py and `export.py --to merged` compute what was trained"
    )


def _gather_vocabulary(model: PreTrainedModel, family: Family) -> dict[str, Tensor]:
    """Return {PEFT's name: full tensor} of the embedding and the head on rank 0, {} on others. Collective.

    A tied weight has both names, and is gathered and stored twice: PEFT looks for both.
    """
    tensors = {}
    for name, parameter in vocabulary_parameters(model, family).items():
        full = full_tensor(parameter).detach()
        if dist.get_rank() == 0:  # host memory would not hold it once for each rank
            tensors[f"{PEFT_PREFIX}{name}"] = full.cpu().clone()  # safetensors refuses shared memory
    return tensors


def _adapter_config(model: PreTrainedModel, config: Config, base: BaseModel, family: Family) -> dict:
    """Return the contents of adapter_config.json."""
    alpha, parameters = config.lora_alpha, peft_target_parameters(family, config)
    in_full = peft_full_modules(model, family, config)
    embeddings: dict = {"modules_to_save": in_full} if in_full else {}
    if config.train_embeddings:
        # PEFT makes a tied head anew, without a bias. Apart, it loads both modules with all of their tensors.
        has_bias = model.get_submodule(family.head).bias is not None
        tied = model.config.tie_word_embeddings and not has_bias
        embeddings["ensure_weight_tying"] = tied
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "r": config.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": config.use_rslora,
        "lora_dropout": config.lora_dropout,
        "target_modules": peft_target_modules(model, family, config),
        "exclude_modules": peft_exclusions(model, family, config),
        "use_dora": config.method.adapter == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        # Older versions of PEFT do not know target_parameters.
        **({"target_parameters": parameters} if parameters else {}),
        **({"rank_pattern": pattern} if (pattern := peft_rank_pattern(config)) else {}),
        # PEFT ignores it, with a warning. What the adapter was trained against is not the base's own matmuls.
        **({"base_matmul": config.base_matmul} if config.base_matmul not in (None, "16bit") else {}),
    } | embeddings


def check_adapter_tensors(
    found: TensorHeaders,
    model: PreTrainedModel,
    family: Family,
    path: Path,
    base: Path,
    settings: str,
    optional: Collection[str] = (),
) -> None:
    """Raise UserError unless an adapter's file holds exactly the tensors that a model trains.

    Compares names and shapes, and requires floating-point dtypes.

    Args:
        found: the headers of the file.
        model: on meta, with its adapters.
        family: the model's family.
        path: the file.
        base: folder of the model.
        settings: name of the file that says which adapters the model has.
        optional: names of tensors that may be missing.
    """
    expected = {
        f"{PEFT_PREFIX}{module.peft_path(name)}.{suffix}": list(tensor.shape)
        for name, module in model.named_modules()
        if isinstance(module, LowRankModule)
        for suffix, tensor in module.peft_tensors(lambda parameter: parameter.detach()).items()
    }
    expected |= {
        f"{PEFT_PREFIX}{name}": list(parameter.shape)
        for name, parameter in (vocabulary_parameters(model, family) | router_parameters(model)).items()
        if parameter.requires_grad
    }
    expected = {name: shape for name, shape in expected.items() if name in found or name not in optional}
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected:
            raise UserError(f"{path}: {name} belongs to no adapter of {base} with the options of {settings}")
        if name not in found:
            raise UserError(f"{path}: {name} is missing")
        shape, dtype = found[name]
        if shape != expected[name]:
            raise UserError(
                f"{path}: {name} has shape {shape}, but {base} and {settings} require {expected[name]}"
            )
        if dtype not in ADAPTER_DTYPES:  # integers would load as weights
            expected_dtypes = ", ".join(ADAPTER_DTYPES)
            raise UserError(f"{path}: {name} is stored as {dtype}; expected one of {expected_dtypes}")


def fill_parameters(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy this rank's shards of full tensors into a module's parameters of these names."""
    parameters = dict(module.named_parameters(recurse=False))
    for name, tensor in tensors.items():
        fill_shard(parameters[name], tensor)


def load_adapter(
    model: nn.Module,
    path: Path,
    set_parameters: Callable[[nn.Module, dict[str, Tensor]], None] = fill_parameters,
) -> None:
    """Load an adapter's file, which `check_adapter_tensors` has checked, into a loaded model, sharded or not.

    Each rank reads the whole file, a module at a time, and keeps its shards. Raises UserError for NaN.

    Args:
        model: the model, with its adapters.
        path: the file.
        set_parameters: set_parameters(module, {name: full tensor}), called for the embedding and the head.
    """
    modules = {unwrapped_name(name): module for name, module in model.named_modules()}
    adapters = {name: module for name, module in modules.items() if isinstance(module, LowRankModule)}
    modules |= {module.peft_path(name): module for name, module in adapters.items()}
    for name, tensors in read_adapter_modules(path):
        module = modules[name]
        if isinstance(module, LowRankModule):
            module.set_peft_tensors(tensors, fill_shard)
        else:
            set_parameters(module, tensors)
