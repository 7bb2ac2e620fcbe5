"""From the options that were given to a run's configuration: defaults that depend on other options, and all
checks that need nothing but the options themselves."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

from options.config import CHECKPOINTS, FIELDS, TOY_DEFAULTS, TOY_MODEL, Config
from options.errors import UserError
from options.methods import METHODS, NEEDS


def resolve(given: dict) -> tuple[Config, list[str]]:
    """(the configuration, remarks to print once) of the options that were given, by name, in their types.
    Raises UserError for what is wrong with them.

    Remarks tell of options that are accepted for older commands but change nothing here.
    """
    _refuse(given)
    config = _resolve(given)
    _check_values(config)
    return config, _remarks(given)


def _refuse(given: dict) -> None:
    """Options without effect for this train type."""
    train_type = given.get("train_type", FIELDS["train_type"].default)
    for name in given:
        needs = FIELDS[name].metadata["needs"]
        if needs and not getattr(METHODS[train_type], needs):
            only = f"it is for {NEEDS[needs]}"
            raise UserError(f"--{name} has no effect with --train_type {train_type}: {only}; leave it out")


def _resolve(given: dict) -> Config:
    """Fills in what depends on other options, and sets to None what has no effect."""
    expanded = given.get("llama_pro_path")  # the same model by another option: it goes first
    given = given | ({} if expanded is None else {"model_name": expanded})
    values = (TOY_DEFAULTS if given.get("model_name", TOY_MODEL) == TOY_MODEL else {}) | given
    config = Config(**values)
    method = config.method
    changes: dict[str, Any] = {}
    if config.lr is None:
        changes["lr"] = method.lr
    if method.hqq:
        defaults = {"n_bits": 4, "group_size": 64}
        changes |= {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.lr_warmup is None:
        changes["lr_warmup"] = 0.0 if config.lr_scheduler == "constant" else 0.1
    folder = config.output_dir or _run_of(config.resume)
    folder = folder or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.train_type}"
    changes["output_dir"] = os.path.expanduser(folder)  # no shell does it in a YAML file
    if config.quantized_cache:
        changes["quantized_cache"] = os.path.abspath(os.path.expanduser(config.quantized_cache))
    changes |= {
        n: None for n, f in FIELDS.items() if f.metadata["needs"] and not getattr(method, f.metadata["needs"])
    }
    return dataclasses.replace(config, **changes)


def _run_of(resume: str | None) -> str | None:
    """The RUN that a --resume PATH belongs to; a checkpoint is RUN/checkpoints/step-<number>."""
    if resume in (None, "auto"):
        return None
    parent = os.path.dirname(os.path.abspath(os.path.expanduser(resume)))
    return os.path.dirname(parent) if os.path.basename(parent) == CHECKPOINTS else resume


def _check_values(config: Config) -> None:
    """What is wrong with options beside others; what each may be by itself is in its declaration."""
    if config.method.expansion and config.model_name == TOY_MODEL:
        raise UserError(
            f"--train_type {config.train_type}: trains the new blocks of an expanded model; make one with"
            " `python block_expansion.py`, and give its folder as --model_name or --llama_pro_path"
        )
    if config.use_activation_cpu_offload and not config.use_gradient_checkpointing:
        raise UserError("--use_activation_cpu_offload: needs --use_gradient_checkpointing true")
    if config.activation_budget and not config.use_gradient_checkpointing:
        raise UserError(
            "--activation_budget: has no effect without --use_gradient_checkpointing true, everything is kept"
        )
    if config.hybrid_shard_size != -1 and not config.sharding_strategy.startswith("hybrid_"):
        raise UserError("--hybrid_shard_size: has no effect without a hybrid --sharding_strategy")
    if config.group_size is not None and config.group_size % 8:
        raise UserError(f"--group_size {config.group_size}: must be a multiple of 8")
    if config.quantized_cache == "":
        raise UserError("--quantized_cache: needs a folder")
    _check_evaluation(config)
    _check_checkpoints(config)
    _check_profiling(config)


def _check_evaluation(config: Config) -> None:
    """The options of the group Evaluation. One that could have no effect is an error."""
    if config.eval_share and config.eval_dataset is not None:
        raise UserError("--eval_share: has no effect with --eval_dataset; leave one of them out")

    if not config.eval_share and config.eval_dataset is None:
        names = ("eval_every", "eval_samples", "early_stopping_patience")
        _needs(config, "--eval_share or --eval_dataset", *names)
    if not config.eval_every:
        _needs(config, "--eval_every", "early_stopping_patience")
    if not config.sample_every:
        _needs(config, "--sample_every", "sample_prompts", "sample_tokens")


def _needs(config: Config, what: str, *names: str) -> None:
    """Raises UserError if one of these options was given, which do something with `what` only."""
    for name in names:
        if getattr(config, name) != FIELDS[name].default:
            raise UserError(f"--{name}: has no effect without {what}")


def _check_profiling(config: Config) -> None:
    """The options of --profile."""
    if not config.profile:
        _needs(config, "--profile", "profiling_output", "overwrite_profiling_output", "with_stack",
               "with_shapes", "export_trace", "export_memory_timeline", "wait_steps", "warmup_steps",
               "active_steps", "repeat", "profiling_frequency")  # fmt: skip
    if config.profile_memory and config.export_memory_timeline:
        one = "torch keeps one record of the memory, and --profile_memory takes it"
        raise UserError(f"--export_memory_timeline: {one}; leave one of them out")
    within = config.warmup_steps + config.active_steps
    if not config.repeat and config.profiling_frequency < within:
        raise UserError(
            f"--profiling_frequency {config.profiling_frequency}: a cycle has {within} steps already"
            f" (--warmup_steps {config.warmup_steps}, --active_steps {config.active_steps})"
        )


def _check_checkpoints(config: Config) -> None:
    if config.resume == "":
        raise UserError("--resume: needs auto, or the folder of a RUN or of a checkpoint")
    if config.resume is not None and config.overwrite:
        raise UserError("--overwrite: contradicts --resume; leave one of them out")


def _remarks(given: dict) -> list[str]:
    remarks = []
    path, name = given.get("llama_pro_path"), given.get("model_name")
    if path is not None and name not in (None, path):
        remarks.append(f"--model_name {name}: not read; --llama_pro_path has weights and config")
    if given.get("reentrant_checkpointing"):
        remarks.append(
            "--reentrant_checkpointing: non-reentrant checkpointing is used; it needs no more memory here"
        )
    if "low_memory" in given and not given["low_memory"]:
        remarks.append("--low_memory false: loading streams one tensor at a time in any case")
    other = "profiling_frequency" if given.get("repeat") else "wait_steps"
    if given.get("profile") and given.get(other, FIELDS[other].default) != FIELDS[other].default:
        means = "are counted by --wait_steps" if given.get("repeat") else "follow from --profiling_frequency"
        remarks.append(
            f"--{other}: not read; with --repeat {given.get('repeat', 0)} the waited steps {means}"
        )
    return remarks
