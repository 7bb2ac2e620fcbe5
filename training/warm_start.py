"""--adapter: train a saved adapter further, on the same base, with a new optimizer and schedule.

Rank, alpha, use_rslora, target modules and chat template are the adapter's. Its tensors replace the initial
ones after the load.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from checkpoints.adapter import check_adapter_tensors
from files.base_model import STRUCTURE_KEY, check_base, tokenizer_remark
from files.config_parts import text_config
from files.model_folder import CheckpointFiles
from files.names import ADAPTER_CONFIG, BEST, EXPERT_PARAMETERS
from files.output_folder import output_folder
from files.saved_adapter import (
    PEFT_PREFIX,
    UNSET,
    SavedAdapter,
    expert_rank,
    open_adapter,
    read_adapter_modules,
    read_adapter_tensors,
    split_name,
)
from launch.precision import Precision
from models.adapters import apply_method, target_linears
from models.family import Family
from models.peft_names import exclude_parts
from models.registry import build_on_meta
from models.routers import NAMES as ROUTER_NAMES
from models.vision_parts import all_vision_linears, vision_matrices
from models.vocabulary import peft_modules_to_save, vocabulary_parameters
from options.config import ADAPTER_OPTIONS, BASE_MATMULS, FIELDS, Config
from options.declaration import format_value
from options.errors import UserError
from options.methods import METHODS
from training.adapter_template import adopt_template
from training.recorded_base import check_recorded_base

ROUTERS = tuple(f"mlp.{name}" for name in ROUTER_NAMES)  # in modules_to_save


@dataclass(frozen=True)
class WarmStart:
    """The adapter that a run continues.

    Attributes:
        name: an absolute folder, or owner/name@commit.
        path: its safetensors file.
        digest: digest of that file.
        remarks: lines to print at start.
        has_template: whether --chat_template is the template that it was trained with.
    """

    name: str
    path: Path
    digest: str
    remarks: tuple[str, ...]
    has_template: bool = False


def adapts_vision(config: Config, family: Family) -> bool:
    """Return whether --adapter acts on vision parts that the model could have, but was not built with.

    Raises UserError if the adapter cannot be read.
    """
    if config.adapter is None or family.vision is None:
        return False
    names = (name.removeprefix(PEFT_PREFIX) for name in open_adapter(config.adapter).tensors)
    return any(map(family.is_unused, names))


def adopt_adapter(
    config: Config,
    base_name: str,
    model_config: PretrainedConfig,
    family: Family,
    files: CheckpointFiles,
    untied_head: str | None,
) -> tuple[Config, WarmStart]:
    """Return (the options with what the adapter decides, the adapter). Reads its tensors.

    Raises UserError if the adapter belongs to another base or cannot be trained as the options say.

    Args:
        config: the run's options; those that the adapter decides are None unless they were given.
        base_name: the model's name, by `pin_model_name`.
        model_config: the model's config.
        family: the model's family.
        files: the model's weights.
        untied_head: as `open_weights` returns it.
    """
    assert config.adapter is not None
    adapter = open_adapter(config.adapter)
    folder, output = adapter.path.parent.resolve(), output_folder(config).resolve()
    if folder in (output, output / BEST):  # --overwrite would delete the weights to read
        raise UserError(f"--output_dir {output}: is the folder of --adapter; choose another")
    remark = _check_adapter_base(adapter, base_name, model_config, files, untied_head)
    config = adopt_options(config, adapter, model_config, family)
    model = build_on_meta(model_config, family)
    apply_method(model, family, config, Precision(torch.float32, torch.float32), files)
    # The base's weights take the place of an embedding or a head that the adapter does not have, and new
    # values that of an adapter on a bare matrix.
    optional = {f"{PEFT_PREFIX}{name}" for name in vocabulary_parameters(model, family)}
    optional -= _saved_vocabulary(adapter, family)
    optional |= _new_matrices(adapter, family, config)
    _check_untrained_vocabulary(adapter, config, family)
    where = adapter.path, files.folder, ADAPTER_CONFIG
    check_adapter_tensors(adapter.tensors, model, family, *where, optional=optional)
    if model_config.tie_word_embeddings:
        _check_tied(adapter, model, family)
    for _ in read_adapter_modules(adapter.path):  # raises for NaN
        pass
    template = adopt_template(config, adapter, files.folder, text_config(model_config).vocab_size)
    told = (
        _describe(config),
        remark,
        _remark_on_matmuls(adapter, config),
        tokenizer_remark(adapter.metadata, files.folder),
        *template.remarks,
    )
    remarks = tuple(filter(None, told))
    warm_start = WarmStart(adapter.name, adapter.path, adapter.digest(), remarks, template.is_adapters)
    return template.config, warm_start


def _describe(config: Config) -> str:
    """Return the line about what the run continues, with the values that the adapter decided."""
    values = ", ".join(f"{name} {format_value(getattr(config, name))}" for name in ADAPTER_OPTIONS)
    return f"--adapter {config.adapter}: trained further, with {values}"


def _remark_on_matmuls(adapter: SavedAdapter, config: Config) -> str:
    """Return a line if the adapter was trained with rounded matmuls of the base, and this run has others."""
    way = adapter.settings.get("base_matmul")  # as checkpoints/adapter.py writes it
    if way not in BASE_MATMULS or way == (config.base_matmul or BASE_MATMULS[0]):
        return ""
    return (
        f"--adapter {config.adapter}: was trained with --base_matmul {way}; this run has {config.base_matmul}"
    )


def _check_kind(adapter: SavedAdapter, config: Config) -> None:
    """Raise UserError if the train type trains LoRA and the adapter is DoRA, or the reverse."""
    kind = "dora" if adapter.settings.get("use_dora") else "lora"
    if kind != config.method.adapter:
        names = {"lora": "LoRA", "dora": "DoRA"}
        fitting = [name for name, method in METHODS.items() if method.adapter == kind]
        raise UserError(
            f"--adapter {adapter.name}: is a {names[kind]} adapter, which --train_type {config.train_type}"
            f" does not train; choose one of {', '.join(fitting)}"
        )


def _check_adapter_base(
    adapter: SavedAdapter,
    base_name: str,
    model_config: PretrainedConfig,
    files: CheckpointFiles,
    untied_head: str | None,
) -> str:
    """Return a remark if the adapter's base could not be compared in full, else "".

    The tensors' shapes are compared later. Raises UserError for another base.
    """
    where = f"--adapter {adapter.name}"
    if STRUCTURE_KEY in adapter.metadata:
        return check_base(adapter.metadata, model_config, files, where, "--model_name", untied_head)
    return check_recorded_base(adapter.settings, base_name, model_config, files, where)


def adopt_options(
    config: Config, adapter: SavedAdapter, model_config: PretrainedConfig, family: Family
) -> Config:
    """Return the options with the adapter's name, rank, alpha, scaling rule and targets.

    Raises UserError for an adapter of another kind, or an option that contradicts it.
    """
    _check_kind(adapter, config)
    _check_unused_parts(adapter, family)
    file = adapter.path.parent / ADAPTER_CONFIG
    rank, alpha = adapter.settings.get("r"), adapter.settings.get("lora_alpha")
    values: dict[str, Any] = {"lora_rank": rank, "lora_alpha": alpha}
    for name, value in values.items():
        within, kinds = FIELDS[name].metadata["within"], (int,) if name == "lora_rank" else (int, float)
        if type(value) not in kinds or not within.contains(value):
            key = {"lora_rank": "r"}.get(name, name)
            raise UserError(f"{file}: {key} {value}: must be {within}")
        if getattr(config, name) not in (None, value):
            raise _contradiction(name, config, adapter, value)
    values["lora_alpha"] = float(values["lora_alpha"])
    values["use_rslora"] = bool(adapter.settings.get("use_rslora"))
    if config.use_rslora not in (None, values["use_rslora"]):
        raise _contradiction("use_rslora", config, adapter, values["use_rslora"])
    saved = adapter.settings.get("modules_to_save")
    values["train_router"] = isinstance(saved, list) and any(name in ROUTERS for name in saved)
    if config.train_router not in (None, values["train_router"]):
        raise _contradiction("train_router", config, adapter, values["train_router"])
    values["train_embeddings"] = bool(_saved_vocabulary(adapter, family)) or bool(config.train_embeddings)
    if config.train_embeddings is False and values["train_embeddings"]:
        raise _contradiction("train_embeddings", config, adapter, True)
    values["vision_targets"] = _adopt_vision(adapter, family)
    if config.vision_targets not in (None, values["vision_targets"]):
        raise _contradiction("vision_targets", config, adapter, values["vision_targets"])
    values["lora_expert_rank"] = expert_rank(adapter.settings)
    if config.lora_expert_rank not in (None, values["lora_expert_rank"]):
        raise _contradiction("lora_expert_rank", config, adapter, values["lora_expert_rank"])
    _check_target_parameters(adapter, config, family)
    targets = _adopt_targets(config, adapter, model_config, family)
    return dataclasses.replace(config, adapter=adapter.name, lora_target_modules=targets, **values)


def _check_unused_parts(adapter: SavedAdapter, family: Family) -> None:
    """Raise UserError if the adapter acts on parts of a wrapper that are not built (a vision tower)."""
    for name in adapter.tensors:
        if not family.is_unused(name.removeprefix(PEFT_PREFIX)):
            continue
        remedy = f"PEFT makes an adapter without them by exclude_modules {exclude_parts(family.unused)!r}"
        if family.vision:
            raise UserError(
                f"--adapter {adapter.name}: adapts {split_name(name)[0]}, which a run without images does not"
                f" load; --images true loads the vision parts; {remedy}"
            )
        parts = " and ".join(part.rpartition(".")[2] for part in family.unused)
        raise UserError(f"{adapter.path}: {name}: adapters on {parts} are not supported here; {remedy}")


def _adopt_vision(adapter: SavedAdapter, family: Family) -> str:
    """Return the --vision_targets of an adapter, by its tensors.

    `check_adapter_tensors` finds later whether all of them are there.
    """
    vision = family.built_vision()
    names = {name.removeprefix(PEFT_PREFIX) for name in adapter.tensors if ".lora_" in name}
    if vision is None or not any(map(family.is_of_vision, names)):
        return "none"
    return "all" if any(name.startswith(f"{vision.blocks}.") for name in names) else "projector"


def _check_target_parameters(adapter: SavedAdapter, config: Config, family: Family) -> None:
    """Raise UserError if PEFT's target_parameters names others than experts, or matrices of a projector."""
    recorded, vision = adapter.settings.get("target_parameters"), family.built_vision()
    if recorded in UNSET:
        return
    known = [f".{name}" for name in vision.matrices] if vision else []
    names = recorded if isinstance(recorded, list) else [recorded]
    if expert_rank(adapter.settings):
        names = [name for name in names if name not in EXPERT_PARAMETERS]
    if not all(any(matrix.endswith(f".{name}") for matrix in known) for name in names):
        file = adapter.path.parent / ADAPTER_CONFIG
        raise UserError(f"{file}: target_parameters {recorded} is not supported here")
    if config.lora_dropout and names:
        raise UserError(
            f"--lora_dropout {config.lora_dropout}: --adapter {adapter.name} adapts a bare matrix,"
            f" {', '.join(map(str, names))}, for which PEFT has no dropout; leave the option out"
        )


def _new_matrices(adapter: SavedAdapter, family: Family, config: Config) -> set[str]:
    """Return PEFT's tensor names of the projector's bare matrices if target_parameters names none."""
    if adapter.settings.get("target_parameters") not in UNSET:
        return set()
    modules = [name.rpartition(".")[0] for name in vision_matrices(family, config)]
    return {f"{PEFT_PREFIX}{name}.lora_{key}.weight" for name in modules for key in "AB"}


def _saved_vocabulary(adapter: SavedAdapter, family: Family) -> set[str]:
    """Return PEFT's tensor names of the embedding and the head, as far as the adapter trained them in full.

    Raises UserError if it trained other modules in full.
    """
    names = adapter.settings.get("modules_to_save") or []
    if isinstance(names, list):
        names = [name for name in names if name not in ROUTERS]
    file, paths = adapter.path.parent / ADAPTER_CONFIG, (family.embedding, family.head)
    known = ", ".join(peft_modules_to_save(family))
    if not isinstance(names, list) or not all(any(f".{p}".endswith(f".{n}") for p in paths) for n in names):
        raise UserError(f"{file}: modules_to_save {names} is not supported here; only {known}")
    if not names:
        return set()
    # The file may have one that is not named: PEFT also saves what ensure_weight_tying ties to a trained one.
    return {
        tensor
        for path in paths
        if (tensor := f"{PEFT_PREFIX}{path}.weight") in adapter.tensors
        or any(f".{path}".endswith(f".{name}") for name in names)
    }


def _check_untrained_vocabulary(adapter: SavedAdapter, config: Config, family: Family) -> None:
    """Raise UserError if the adapter holds an embedding or a head, and the run does not train them.

    PEFT saves them beside the adapter without modules_to_save after a resize of the vocabulary, or if asked.
    """
    paths = (family.embedding, family.head)
    if config.train_embeddings or not any(f"{PEFT_PREFIX}{path}.weight" in adapter.tensors for path in paths):
        return
    raise UserError(
        f"{adapter.path}: holds the embedding or the head in full (PEFT's save_embedding_layers);"
        " --train_embeddings true starts from them and trains them"
    )


def _check_tied(adapter: SavedAdapter, model: PreTrainedModel, family: Family) -> None:
    """Raise UserError if the adapter has trained only one of two tied weights, or both apart.

    PEFT unties them then, unless its ensure_weight_tying is set. A head's bias is lost by that: refused too.
    """
    both = {f"{PEFT_PREFIX}{path}.weight" for path in (family.embedding, family.head)}
    # Without modules_to_save PEFT may have saved one of them, or both.
    saved = _saved_vocabulary(adapter, family) or (both if both <= adapter.tensors.keys() else set())
    tensors = [t for name, t in read_adapter_tensors(adapter.path) if name in saved]
    if saved and (len(tensors) < 2 or not torch.equal(*tensors)):
        file, names = adapter.path.parent / ADAPTER_CONFIG, adapter.settings.get("modules_to_save")
        raise UserError(
            f"{file}: modules_to_save {names}: trained apart the embedding and the head, which the base ties;"
            " only adapters of PEFT's ensure_weight_tying are trained further"
        )
    bias = f"{PEFT_PREFIX}{family.head}.bias"
    if saved and model.get_submodule(family.head).bias is not None and bias not in adapter.tensors:
        raise UserError(
            f"{adapter.path}: has no {bias}: PEFT has trained the head without its bias; train the base with"
            " --train_embeddings true instead"
        )


def _adopt_targets(
    config: Config, adapter: SavedAdapter, model_config: PretrainedConfig, family: Family
) -> str:
    """Return --lora_target_modules that selects the adapter's linears: as it was given, or the adapter's.

    Raises UserError if the given one selects others.
    """
    model = build_on_meta(model_config, family)
    linears = list(family.layer_linear_names(model))
    own = _own_targets(adapter, linears)
    _check_other_targets(adapter, model, [*linears, *all_vision_linears(model, family)])
    try:
        selected = target_linears(model, family, own)
    except UserError as e:
        file, text = adapter.path.parent / ADAPTER_CONFIG, str(e).removeprefix("--lora_target_modules: ")
        raise UserError(f"{file}: target_modules: {text}") from None
    given = config.lora_target_modules
    if given is None:
        return own
    if target_linears(model, family, given) != selected:
        raise _contradiction("lora_target_modules", config, adapter, own)
    return given


def _own_targets(adapter: SavedAdapter, linears: list[str]) -> str:
    """Return the adapter's target_modules as --lora_target_modules takes them. UserError if none fits.

    PEFT ignores names that match nothing, if others match. It also takes a regular expression; then the
    names of the file's linears replace it. linears: names of the decoder layers' linears.
    """
    recorded = adapter.settings.get("target_modules")
    if isinstance(recorded, str):
        adapted = {split_name(name)[0] for name in adapter.tensors if ".lora_" in name}
        recorded = sorted(adapted.intersection(linears))  # not those of vision parts
    names = [n for n in recorded if isinstance(n, str) and n] if isinstance(recorded, list) else []
    own = [n for n in names if any(f".{linear}".endswith(f".{n}") for linear in linears)]
    if not own:
        file = adapter.path.parent / ADAPTER_CONFIG
        raise UserError(f"{file}: target_modules {recorded}: names no linear of this model's layers")
    return ",".join(own)


def _check_other_targets(adapter: SavedAdapter, model: nn.Module, linears: list[str]) -> None:
    """Raise UserError if target_modules names modules of the model that get no adapter here, such as lm_head.

    linears: names of the linears that may have an adapter.
    """
    recorded = adapter.settings.get("target_modules")
    modules = [f".{name}" for name, _ in model.named_modules() if name]
    for target in recorded if isinstance(recorded, list) else []:
        matched = [name for name in modules if name.endswith(f".{target}")]
        if matched and not any(f".{linear}".endswith(f".{target}") for linear in linears):
            raise UserError(
                f"{adapter.path.parent / ADAPTER_CONFIG}: target_modules {target}: is no linear of the"
                " decoder layers; only these have an adapter here"
            )


def _contradiction(name: str, config: Config, adapter: SavedAdapter, value: Any) -> UserError:
    """Return the error for an option that was given with another value than the adapter's."""
    given = format_value(getattr(config, name))
    return UserError(
        f"--{name} {given}: contradicts --adapter {adapter.name}, which has {format_value(value)}; leave the"
        " option out"
    )
