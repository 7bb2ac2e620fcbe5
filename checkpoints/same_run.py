"""Whether a resumed run is still the same: its options, and digests of its model and rows.

Frozen weights and data are in no checkpoint. So a checkpoint's manifest holds the run's options, and digests
of the model and of the rows. Options that change only speed, memory or output may differ; all others must
have their old values.
"""

from __future__ import annotations

import dataclasses
import math
import re

from checkpoints.storage import GROWING_FILES, Checkpoint
from files.base_model import is_same_base, no_head_message
from options.config import COMPATIBILITY, DAY, FIELDS, Config
from options.declaration import format_value
from options.errors import UserError
from options.methods import METHODS

# A resumed run may have other values of the options in these groups, which change no result beyond rounding
# ...
FREE_GROUPS = (
    "Memory and speed",
    "Launch",
    "Checkpoints",
    "Output",
    "Profiling",
    "Evaluation",
    COMPATIBILITY,
)
# ... except for FIXED_OPTIONS, and of the options in FREE_OPTIONS. Model and data, also what is learned of
# them, are compared by contents instead of names, a preset by its values, and --precision by what it means
# on this GPU.
FIXED_OPTIONS = ("eval_share", "eval_fold", "base_matmul")
FREE_OPTIONS = ("preset", "model_name", "adapter", "dataset", "columns", "text_column", "empty_thinking",
                "images", "image_folder", "llama_pro_path", "llama_pro_save", "batch_size",
                "gradient_accumulation_steps", "effective_batch_size", "num_epochs", "max_steps",
                "max_bad_steps", "deterministic")  # fmt: skip


# The form of a manifest's `run`. Values of int are not negative; no float is NaN. A name that ends with ? may
# be missing: not all runs, or not all older versions of this program, write it.
RUN_STATE_FORM = {
    "options": {}, "rows_per_step": int, "base": str, "data": str, "evaluation?": str, "adapter?": str,
    "world": int, "router_loss?": float,
    "precision": str,
    "files": {},
    "parts": {
        "scaler": {},
        "evaluator": {"best_step": int, "best_loss": float, "worse": int, "stop": bool,
                      "kept_step?": int, "kept_loss?": float},
        "tracker": {"held": str, "wandb?": str},
        "guard": {"count": int, "applied?": int},
    },
}  # fmt: skip


def is_run_state(run: dict) -> bool:
    """Return whether a manifest's `run` has the form of RUN_STATE_FORM, and no impossible names or values."""
    return (
        _matches(run, RUN_STATE_FORM)
        and all(name in GROWING_FILES and _matches(length, int) for name, length in run["files"].items())
        and all(_matches(n, float) and 0 <= n < math.inf for n in run["parts"]["scaler"].values())
        and run["parts"]["tracker"]["held"].isascii()
        and _is_wandb_run(run["parts"]["tracker"].get("wandb", "none"))
    )


def _matches(value, form: type | dict) -> bool:
    """Return whether a value has a form: a type, or a dict of names and forms, as RUN_STATE_FORM is."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(
            _matches(value[name], inner) if (name := key.removesuffix("?")) in value else name != key
            for key, inner in form.items()
        )
    if form is float:
        return (type(value) is float and value == value) or _matches(value, int)
    if form is int:
        return type(value) is int and 0 <= value < 2**63
    return type(value) is form


def _is_wandb_run(name: str) -> bool:
    """Return whether a text may be wandb's name of a run, which becomes part of a file name.

    WANDB_RUN_ID may have dots and spaces.
    """
    return 0 < len(name) <= 128 and name.isprintable() and not {*name} & {*"/\\"}


def is_fixed(option: str) -> bool:
    """Return whether a resumed run must have the same value of an option."""
    return option in FIXED_OPTIONS or (
        FIELDS[option].metadata["group"] not in FREE_GROUPS and option not in FREE_OPTIONS
    )


def run_identity(
    config: Config,
    precision: str,
    base_digest: str,
    data_digest: str,
    evaluation_digest: str,
    adapter_digest: str,
    router_loss: float | None,
) -> dict:
    """Return a run's options and digests, which checkpoints hold and `check_same_run` compares.

    The keys are those of RUN_STATE_FORM, without "files" and "parts".

    Args:
        precision: The meaning of --precision on this machine.
        base_digest: Of the base model (`BaseModel.digest`).
        data_digest: Of the rows.
        evaluation_digest: Of the rows of the evaluation; "" without any.
        adapter_digest: Of the adapter of --adapter; "" without one.
        router_loss: Factor of the routers' auxiliary loss, if there is one.
    """
    return ({} if router_loss is None else {"router_loss": router_loss}) | {
        "options": dataclasses.asdict(config),
        "rows_per_step": rows_per_step(config),
        "base": base_digest,
        "data": data_digest,
        "evaluation": evaluation_digest,
        "adapter": adapter_digest,
        "world": config.world_size,
        "precision": precision,
    }


def rows_per_step(config: Config) -> int:
    """Return the number of rows, or packs of rows, of an optimizer step on all ranks together."""
    return config.world_size * config.batch_size * config.gradient_accumulation_steps


def recorded_option(run: dict, option: str):
    """Return an option's value in `Checkpoint.run`.

    If an older version lacked the option, it is the default, or None if the train type does not use it.
    """
    options, needs = run["options"], FIELDS[option].metadata["needs"]
    if option in options:
        return options[option]
    method = METHODS.get(options.get("train_type"))
    return FIELDS[option].default if not needs or method is None or getattr(method, needs) else None


def recorded_chat_date(checkpoint: Checkpoint) -> str | None:
    """Return --chat_date of the run's first start; None if the checkpoint has none, or no valid one."""
    date = recorded_option(checkpoint.run, "chat_date") if is_run_state(checkpoint.run) else None
    return date if isinstance(date, str) and re.fullmatch(DAY, date) else None


def check_same_run(
    checkpoint: Checkpoint, config: Config, identity: dict, without_head: tuple[str, str] | None = None
) -> None:
    """Raise UserError unless the checkpoint's run has the fixed options, model and rows of this run.

    Args:
        config: The options of the resumed run.
        identity: Its `run_identity`.
        without_head: (the tensor of the model's own head, the model's digest without it), for checkpoints of
            older versions, which ignored the head; None if the model has no such head.
    """
    where, run = f"--resume {config.resume}", checkpoint.run
    if not is_run_state(run):
        raise UserError(f"{where}: {checkpoint.folder} is no checkpoint of this program")
    _check_same_adapter(run, config, identity["adapter"])  # first, as it decides other options
    for name in FIELDS:
        before, value = recorded_option(run, name), getattr(config, name)
        if is_fixed(name) and before != value:
            raise UserError(
                f"{where}: the run has --{name} {format_value(before)}, not {format_value(value)};"
                " resume a run with its original options"
            )
    if run["precision"] != (here := identity["precision"]):
        raise UserError(
            f"{where}: the run has --precision {recorded_option(run, 'precision')}, not {config.precision},"
            f" which on this machine is {here}, not {run['precision']}"
        )
    if run["rows_per_step"] != identity["rows_per_step"]:
        raise UserError(
            f"{where}: a step of the run has {run['rows_per_step']} rows; {config.world_size} processes x"
            f" --batch_size {config.batch_size} x --gradient_accumulation_steps"
            f" {config.gradient_accumulation_steps} would make it {identity['rows_per_step']}"
        )
    if without_head and is_same_base(run["base"], without_head[1]):
        raise UserError(f"{where}: {no_head_message(without_head[0], config.model_name, '--model_name')}")
    if not is_same_base(run["base"], identity["base"]):
        raise UserError(
            f"{where}: --model_name {config.model_name} is not the model that the run was started with"
        )
    before, factor = run.get("router_loss"), identity.get("router_loss")
    if before != factor:
        raise UserError(
            f"{where}: the run has {_describe_router_loss(before)}, and config.json of --model_name"
            f" {config.model_name} now asks for {_describe_router_loss(factor)}"
        )
    if run["data"] != identity["data"]:
        raise UserError(
            f"{where}: --dataset {config.dataset} no longer gives the rows that the run was started with;"
            " the data, the tokenizer or its chat template changed" + _describe_recorded_data(run, config)
        )
    # A run may begin to evaluate, or cease to, when it is resumed.
    before = run.get("evaluation")
    if before and identity["evaluation"] and before != identity["evaluation"]:
        option = "eval_dataset" if config.eval_dataset else "dataset"
        raise UserError(
            f"{where}: --{option} no longer gives the rows that the run is evaluated on; best/ would be"
            " chosen by comparing losses on two different sets"
        )


def _describe_router_loss(factor: float | None) -> str:
    return "no auxiliary loss of routers" if factor is None else f"that of routers times {factor:g}"


def _check_same_adapter(run: dict, config: Config, digest: str) -> None:
    """Raise UserError unless the run continues the adapter that it was started with.

    Args:
        run: `Checkpoint.run`.
        config: the options of the resumed run.
        digest: of the adapter of --adapter; "" without one.
    """
    recorded = run.get("adapter", "")
    if recorded == digest:
        return
    where, before = f"--resume {config.resume}", format_value(recorded_option(run, "adapter"))
    if not recorded:
        raise UserError(f"{where}: the run was started without --adapter; leave it out")
    given = "it is left out here" if config.adapter is None else f"not {format_value(config.adapter)}"
    raise UserError(
        f"{where}: the run was started with --adapter {before}; that adapter is needed, unchanged; {given}"
    )


def _describe_recorded_data(run: dict, config: Config) -> str:
    """Return the end of an error that names the run's own --dataset, with its commits and weights; or ""."""
    before = recorded_option(run, "dataset")
    return "" if before == config.dataset else f"; the run has --dataset {format_value(before)}"


def describe_changes(checkpoint: Checkpoint, config: Config, base_digest: str) -> list[str]:
    """Return lines that tell the user what differs from the saved run and affects this one; [] if nothing.

    base_digest: As for `run_identity`.
    """
    run, lines = checkpoint.run, []
    if run["base"] != base_digest:
        lines.append(
            f"--resume: an earlier version of this program made {checkpoint.folder}, without a digest of"
            " 4-bit weights; the model is recognised by its other weights"
        )
    if run["world"] != config.world_size and config.lora_dropout:
        lines.append(
            f"--resume: {config.world_size} processes instead of {run['world']} draw other random numbers for"
            " --lora_dropout"
        )
    for name in ("num_epochs", "max_steps"):
        before, value = recorded_option(run, name), getattr(config, name)
        if before != value and (config.lr_scheduler != "constant" or config.lr_warmup):
            lines.append(
                f"--resume: --{name} {value} instead of {before}: the learning rate follows it from here on"
            )
    return lines
