"""Turns the given options into a run's configuration.

Fills in defaults that depend on other options, and does all checks that need only the options themselves.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

from options.columns import check_column_options
from options.config import (
    ADAPTER_OPTIONS,
    CHECKPOINTS,
    EMBEDDED_MODELS,
    FIELDS,
    TOY_DEFAULTS,
    TOY_MODEL,
    Config,
)
from options.declaration import AUTO
from options.errors import UserError
from options.methods import METHODS, NEEDS


def resolve(given: dict) -> tuple[Config, list[str]]:
    """Return (Config, remarks to print on options that are not read). Raises UserError for contradictions.

    given: the options that were given, {name: converted value}. Options that are not read are, for instance,
    those accepted only for older commands.
    """
    _check_train_type(given)
    config = _fill_in(given)
    _check_values(config)
    return config, _describe_unread(given)


def _check_train_type(given: dict) -> None:
    """Raise UserError for an option that has no effect with the train type."""
    train_type = given.get("train_type", FIELDS["train_type"].default)
    for name in given:
        needs = FIELDS[name].metadata["needs"]
        if needs and not getattr(METHODS[train_type], needs):
            reason = f"it is for {NEEDS[needs]}"
            raise UserError(f"--{name} has no effect with --train_type {train_type}: {reason}; leave it out")


def _fill_in(given: dict) -> Config:
    """Return the Config: all defaults filled in, and None for options that the train type does not use."""
    expanded = given.get("llama_pro_path")  # another option for the model; it overrides --model_name
    given = given | ({} if expanded is None else {"model_name": expanded})
    is_embedded = given.get("model_name", TOY_MODEL) in EMBEDDED_MODELS
    values = (TOY_DEFAULTS if is_embedded else {}) | given
    config = Config(**values)
    method = config.method
    changes: dict[str, Any] = {}
    if config.effective_batch_size is not None:
        if config.batch_size == AUTO or "gradient_accumulation_steps" not in given:
            changes["gradient_accumulation_steps"] = AUTO
        elif "batch_size" not in given:
            changes["batch_size"] = AUTO
    if config.lr is None:
        changes["lr"] = method.lr
    if method.hqq:
        defaults = {"n_bits": 4, "group_size": 64}
        changes |= {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.images == "auto" and (config.vision_targets != "none" or config.vision_bits == 4):
        changes["images"] = "true"
    if config.adapter is not None:
        changes |= {name: None for name in ADAPTER_OPTIONS if name not in given}
    if config.lr_warmup is None:
        changes["lr_warmup"] = 0.0 if config.lr_scheduler == "constant" else 0.1
    folder = config.output_dir or run_folder(config.resume)
    folder = folder or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.train_type}"
    changes["output_dir"] = os.path.expanduser(folder)  # in a YAML file no shell expands ~
    if config.quantized_cache:
        changes["quantized_cache"] = os.path.abspath(os.path.expanduser(config.quantized_cache))
    changes |= {
        n: None for n, f in FIELDS.items() if f.metadata["needs"] and not getattr(method, f.metadata["needs"])
    }
    return dataclasses.replace(config, **changes)


def run_folder(resume: str | None) -> str | None:
    """Return the folder of the RUN that --resume names; None if it is auto or not given.

    resume: a RUN, or one of its checkpoints, RUN/checkpoints/step-<number>.
    """
    if resume in (None, "auto"):
        return None
    parent = os.path.dirname(os.path.abspath(os.path.expanduser(resume)))
    return os.path.dirname(parent) if os.path.basename(parent) == CHECKPOINTS else resume


def _check_values(config: Config) -> None:
    """Raise UserError for options that contradict one another or have no effect beside the others.

    Also checks two options whose rules `option()` cannot express.
    """
    if config.method.expansion and config.model_name in EMBEDDED_MODELS:
        raise UserError(
            f"--train_type {config.train_type}: trains the new blocks of an expanded model; make one with"
            " `python block_expansion.py`, and give its folder as --model_name or --llama_pro_path"
        )
    if config.use_activation_cpu_offload and not config.use_gradient_checkpointing:
        raise UserError("--use_activation_cpu_offload: needs --use_gradient_checkpointing true")
    if config.activation_budget and not config.use_gradient_checkpointing:
        raise UserError(
            "--activation_budget: has no effect without --use_gradient_checkpointing true: all activations"
            " are saved then"
        )
    if config.hybrid_shard_size != -1 and not config.sharding_strategy.startswith("hybrid_"):
        raise UserError("--hybrid_shard_size: has no effect without a hybrid --sharding_strategy")
    if config.group_size is not None and config.group_size % 8:
        raise UserError(f"--group_size {config.group_size}: must be a multiple of 8")
    for name in ("train_embeddings", "train_router"):
        if getattr(config, name) and not config.method.adapter:
            raise UserError(
                f"--{name} has no effect with --train_type {config.train_type}: it is for"
                f" {NEEDS['adapter']}; leave it out"
            )
    if config.vision_bits == 4 and config.n_bits not in (None, 4):
        raise UserError(
            f"--vision_bits 4: the vision tower is packed as the decoder layers are, with --n_bits"
            f" {config.n_bits}; leave one of them out"
        )
    if config.adapter == "":
        raise UserError("--adapter: needs a RUN, a folder or a hub id")
    if config.quantized_cache == "":
        raise UserError("--quantized_cache: needs a folder")
    if not config.packing:
        _check_unused(config, "--packing", "images_per_pack")
    check_column_options(config.columns, config.text_column)
    _check_evaluation(config)
    _check_resume_options(config)
    _check_profiling(config)


def _check_evaluation(config: Config) -> None:
    """Raise UserError for an option of the group Evaluation that has no effect beside the others."""
    if config.eval_share and config.eval_dataset is not None:
        raise UserError("--eval_share: has no effect with --eval_dataset; leave one of them out")
    if config.eval_fold and (config.eval_share or config.eval_dataset is not None):
        other = "--eval_share" if config.eval_share else "--eval_dataset"
        raise UserError(f"--eval_fold: has no effect with {other}; leave one of them out")
    if not config.evaluates:
        names = ("eval_every", "eval_samples", "early_stopping_patience")
        _check_unused(config, "--eval_share, --eval_fold or --eval_dataset", *names)
    if not config.eval_every:
        _check_unused(config, "--eval_every", "early_stopping_patience")
    if not config.sample_every:
        _check_unused(config, "--sample_every", "sample_prompts", "sample_tokens")


def _check_unused(config: Config, requirement: str, *names: str) -> None:
    """Raise UserError if one of these options, which need `requirement`, does not have its default value."""
    for name in names:
        if getattr(config, name) != FIELDS[name].default:
            raise UserError(f"--{name}: has no effect without {requirement}")


def _check_profiling(config: Config) -> None:
    """Raise UserError for profiling options without effect, or a cycle above --profiling_frequency."""
    if not config.profile and config.warmup_steps != FIELDS["warmup_steps"].default:
        raise UserError(
            "--warmup_steps: has no effect without --profile: it counts steps of the profiler; the learning"
            " rate's warm-up is --lr_warmup, a share of the steps"
        )
    if not config.profile:
        _check_unused(config, "--profile", "profiling_output", "overwrite_profiling_output", "with_stack",
                      "with_shapes", "export_trace", "export_memory_timeline", "wait_steps", "active_steps",
                       "repeat", "profiling_frequency")  # fmt: skip
    if config.profile_memory and config.export_memory_timeline:
        reason = "torch keeps one record of the memory, and --profile_memory takes it"
        raise UserError(f"--export_memory_timeline: {reason}; leave one of them out")
    cycle = config.warmup_steps + config.active_steps
    if not config.repeat and config.profiling_frequency < cycle:
        raise UserError(
            f"--profiling_frequency {config.profiling_frequency}: a cycle has {cycle} steps already"
            f" (--warmup_steps {config.warmup_steps}, --active_steps {config.active_steps})"
        )


def _check_resume_options(config: Config) -> None:
    """Raise UserError if --resume is empty, or is given together with --overwrite."""
    if config.resume == "":
        raise UserError("--resume: needs auto, or the folder of a RUN or of a checkpoint")
    if config.resume is not None and config.overwrite:
        raise UserError("--overwrite: contradicts --resume; leave one of them out")


def _describe_unread(given: dict) -> list[str]:
    """Return a line for each given option that is accepted but not read."""
    remarks = []
    effective, accumulation = given.get("effective_batch_size"), given.get("gradient_accumulation_steps")
    if effective and accumulation and given.get("batch_size") == AUTO:
        remarks.append(
            f"--gradient_accumulation_steps {accumulation}: not read; with --batch_size auto it follows from"
            f" --effective_batch_size {effective}"
        )
    path, name = given.get("llama_pro_path"), given.get("model_name")
    if path is not None and name not in (None, path):
        remarks.append(f"--model_name {name}: ignored: weights and config come from --llama_pro_path")
    if given.get("reentrant_checkpointing"):
        remarks.append(
            "--reentrant_checkpointing: non-reentrant checkpointing is used; it needs no more memory here"
        )
    if "low_memory" in given and not given["low_memory"]:
        remarks.append("--low_memory false: loading streams one tensor at a time in any case")
    repeat = given.get("repeat", 0)
    unread = "profiling_frequency" if repeat else "wait_steps"
    if given.get("profile") and given.get(unread, FIELDS[unread].default) != FIELDS[unread].default:
        reason = "are counted by --wait_steps" if repeat else "follow from --profiling_frequency"
        remarks.append(f"--{unread}: not read; with --repeat {repeat} the waited steps {reason}")
    return remarks
