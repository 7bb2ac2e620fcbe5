"""--resume: which checkpoint a run goes on from, and whether the run is still the same one.

Frozen weights and data are in no checkpoint. What fixed them is: the options, and digests of the model and of the
rows. Options that change speed, memory or what is told may differ; all others must be what they were.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path

from checkpoints.storage import (
    GROWING_FILES,
    MANIFEST,
    Damaged,
    Saved,
    folder_of,
    newest_whole,
    read_checkpoint,
    remove_checkpoints,
    steps_in,
)
from files.base_model import is_same_base, no_head_message
from files.names import ADAPTER_CONFIG, BEST, BLOCKS, CONFIG
from files.output_folder import check_output, holds_run, output_folder
from monitoring.metrics import read_metrics
from options.config import CHECKPOINTS, COMPATIBILITY, DAY, FIELDS, Config
from options.declaration import format_value
from options.errors import UserError

# A resumed run may differ in the options of these groups, which change no result beyond rounding ...
FREE_GROUPS = (
    "Memory and speed",
    "Launch",
    "Checkpoints",
    "Output",
    "Profiling",
    "Evaluation",
    COMPATIBILITY,
)
# ... but for these; and in these of the others. The names of model and data: their contents are compared, and so is
# what --precision comes to, which goes by the GPU.
FIXED = ("eval_share",)
FREE = ("model_name", "dataset", "llama_pro_path", "llama_pro_save", "batch_size", "gradient_accumulation_steps",
        "num_epochs", "max_steps", "max_bad_steps", "deterministic")  # fmt: skip


# What a checkpoint says of a run, by name: numbers of int are not negative, no float is NaN. ?: not of every run, or
# not of those that older versions of this program made.
STATE = {
    "options": {}, "rows_per_step": int, "base": str, "data": str, "evaluation?": str, "world": int, "precision": str,
    "files": {},
    "parts": {
        "scaler": {},
        "evaluator": {"best_step": int, "best_loss": float, "worse": int, "stop": bool, "kept_step?": int,
                      "kept_loss?": float},
        "tracker": {"held": str, "wandb?": str},
        "guard": {"count": int, "applied?": int},
    },
}  # fmt: skip


def is_state(run: dict) -> bool:
    """Whether a manifest's `run` has the form of STATE, and the values that have no fixed names are what they can be."""
    return (
        _fits(run, STATE)
        and all(name in GROWING_FILES and _fits(length, int) for name, length in run["files"].items())
        and all(_fits(number, float) and 0 <= number < math.inf for number in run["parts"]["scaler"].values())
        and run["parts"]["tracker"]["held"].isascii()
        and _is_name(run["parts"]["tracker"].get("wandb", "none"))
    )


def _fits(value, form: type | dict) -> bool:
    if isinstance(form, dict):
        return isinstance(value, dict) and all(
            _fits(value[name], inner) if (name := key.removesuffix("?")) in value else name != key
            for key, inner in form.items()
        )
    if form is float:
        return (type(value) is float and value == value) or _fits(value, int)
    if form is int:
        return type(value) is int and 0 <= value < 2**63
    return type(value) is form


def _is_name(wandb: str) -> bool:
    """Whether it may be a run of wandb's, which becomes part of a file's name: WANDB_RUN_ID may have dots and spaces."""
    return 0 < len(wandb) <= 128 and wandb.isprintable() and not {*wandb} & {*"/\\"}


def is_fixed(name: str) -> bool:
    """Whether a resumed run must have the same value of an option."""
    return name in FIXED or (FIELDS[name].metadata["group"] not in FREE_GROUPS and name not in FREE)


def resume_after_restart(config: Config) -> Config:
    """`config`, with --resume auto if torchrun --max-restarts has started the run anew after a failure. Raises
    UserError where a restart would not find what this start is going to leave."""
    attempt, most = (int(os.environ.get(f"TORCHELASTIC_{n}", "0")) for n in ("RESTART_COUNT", "MAX_RESTARTS"))
    assert config.output_dir is not None
    by_time = (
        re.fullmatch(r"runs/\d{8}-\d{6}-\w+", config.output_dir) and not Path(config.output_dir).exists()
    )
    if most and by_time:
        raise UserError(
            "--output_dir: is needed under torchrun --max-restarts: a restart goes on with the run in it"
        )
    if most and not attempt and config.overwrite and steps_in(Path(config.output_dir)):
        raise UserError(
            f"--overwrite: {config.output_dir} has checkpoints, which a restart by torchrun could not tell from this run's;"
            " remove it, or choose another --output_dir"
        )
    if attempt:
        return dataclasses.replace(config, resume=config.resume or "auto", overwrite=False)
    return config


def _check_may_begin_anew(run: Path) -> None:
    """Raises UserError where more would be lost of a run without a whole checkpoint than its first steps."""
    why = None
    if any((run / name).exists() for name in (ADAPTER_CONFIG, CONFIG, BLOCKS)):
        why = "a finished run without checkpoints"
    elif any((folder_of(run, step) / MANIFEST).exists() for step in steps_in(run)):
        why = "no checkpoint that is whole"
    if why:
        raise UserError(f"--resume auto: {run} holds {why}; choose another --output_dir")


def find_checkpoint(config: Config) -> Saved | None:
    """What --resume means; None: start from the beginning. Raises UserError."""
    run = output_folder(config)
    if config.resume is None:
        return None
    if config.resume == "auto":
        saved = newest_whole(run, tell=print)
        if saved is None:
            if holds_run(run):
                _check_may_begin_anew(run)
            print(f"--resume auto: {run} has no checkpoint yet; from the start")
        return saved
    path = Path(config.resume).expanduser()
    if not path.is_dir():
        raise UserError(f"--resume {config.resume}: no such folder")
    single = (path / MANIFEST).is_file() or path.parent.name == CHECKPOINTS
    if (path.parent.parent if single else path).resolve() != run.resolve():
        raise UserError(
            f"--resume {config.resume}: is not in --output_dir {run}; a run goes on in its own folder"
        )
    try:
        saved = read_checkpoint(path) if single else newest_whole(path, tell=print)
    except Damaged as e:
        raise UserError(f"--resume {config.resume}: no whole checkpoint ({e})") from None
    if saved is None:
        raise UserError(f"--resume {config.resume}: holds no whole checkpoint")
    return saved


def about(config: Config, precision: str, base: str, data: str, evaluation: str) -> dict:
    """What a checkpoint says of the run and `check_same` compares.

    Args:
        precision: what --precision means on this machine.
        base: a digest of the model below, as `BaseModel.digest` makes it.
        data, evaluation: digests of the rows of the two sets; evaluation "" = there is none.
    """
    return {"options": dataclasses.asdict(config), "rows_per_step": rows_per_step(config), "base": base, "data": data,
            "evaluation": evaluation, "world": config.world_size, "precision": precision}  # fmt: skip


def rows_per_step(config: Config) -> int:
    return config.world_size * config.batch_size * config.gradient_accumulation_steps


def option_of(run: dict, name: str):
    """An option's value in the run of a checkpoint; its default, if that run's program did not have the option."""
    return run["options"].get(name, FIELDS[name].default)


def first_day(saved: Saved) -> str | None:
    """--chat_date of the run's first start; None where an older version of this program began it."""
    day = option_of(saved.run, "chat_date") if is_state(saved.run) else None
    return day if isinstance(day, str) and re.fullmatch(DAY, day) else None


def check_same(saved: Saved, config: Config, now: dict, without_head: tuple[str, str] | None = None) -> None:
    """Raises UserError unless `config` goes on with the run of the checkpoint, over the same model and rows.

    Args:
        now: the run that is to go on, as `about` tells of it.
        without_head: (the tensor of the model's own head, the model's digest without it), as in checkpoints of
            earlier versions, which left the head out; None if the model has no such head.
    """
    where, run = f"--resume {config.resume}", saved.run
    if not is_state(run):
        raise UserError(f"{where}: {saved.folder} is no checkpoint of this program")
    for name in FIELDS:
        before = option_of(run, name)
        if is_fixed(name) and before != getattr(config, name):
            raise UserError(
                f"{where}: the run has --{name} {format_value(before)}, not {format_value(getattr(config, name))}; a run goes"
                " on with what it began with"
            )
    if run["precision"] != (here := now["precision"]):
        raise UserError(
            f"{where}: the run has --precision {option_of(run, 'precision')}, not {config.precision}, which on this"
            f" machine is {here}, not {run['precision']}"
        )
    if run["rows_per_step"] != now["rows_per_step"]:
        raise UserError(
            f"{where}: a step of the run has {run['rows_per_step']} rows; {config.world_size} processes x"
            f" --batch_size {config.batch_size} x --gradient_accumulation_steps"
            f" {config.gradient_accumulation_steps} would make it {now['rows_per_step']}"
        )
    if without_head and is_same_base(run["base"], without_head[1]):
        raise UserError(f"{where}: {no_head_message(without_head[0], config.model_name, '--model_name')}")
    if not is_same_base(run["base"], now["base"]):
        raise UserError(f"{where}: --model_name {config.model_name} is not the model that the run began with")
    if run["data"] != now["data"]:
        raise UserError(
            f"{where}: --dataset {config.dataset} no longer makes the rows that the run began with"
        )
    # A run without evaluation may begin to evaluate, and another one cease to.
    before = run.get("evaluation")
    if before and now["evaluation"] and before != now["evaluation"]:
        raise UserError(
            f"{where}: --{'eval_dataset' if config.eval_dataset else 'dataset'} no longer makes the rows that the run"
            " is evaluated on; the best step would be chosen by losses of two sets"
        )
    check_files(saved, output_folder(config))


def check_still_so(config: Config, saved: Saved | None) -> None:
    """Raises UserError if another run has written in the folder since it was checked, while this one loaded. To be asked
    when no other can write there any more."""
    run = output_folder(config)
    if saved is None:
        check_output(run, config.overwrite or config.resume is not None)
        if config.resume:
            _check_may_begin_anew(run)
    elif not (saved.folder / MANIFEST).exists():
        raise UserError(f"--output_dir {run}: another run has gone on there meanwhile; start again")


def check_files(saved: Saved, folder: Path) -> None:
    """Raises UserError if the RUN's files end before the checkpoint's step, or are links, which would have another
    file cut."""
    for name in GROWING_FILES:
        path, length = folder / name, saved.run["files"].get(name, 0)
        if path.is_symlink():
            raise UserError(f"{path}: is a link; a run goes on in files of its own")
        if length and (not path.is_file() or path.stat().st_size < length):
            raise UserError(f"{path}: is missing or cut: it ends before step {saved.step} of the checkpoint")
    path, held = folder / GROWING_FILES[0], saved.run["parts"]["tracker"]["held"]
    length = saved.run["files"].get(path.name, 0)
    steps = len(read_metrics(path, length)) if length else 0
    if steps + held.count("\n") != saved.step:
        raise UserError(
            f"{path}: has {steps} lines, which are not those of step {saved.step} of the checkpoint"
        )


def tidy(folder: Path, saved: Saved | None) -> None:
    """Makes a RUN what it was at the checkpoint's step: what comes after it will be made again. Without a
    checkpoint no other one stays."""
    remove_checkpoints(folder, after=saved.step if saved else 0)
    if saved is None:
        return
    for name in GROWING_FILES:
        if length := saved.run["files"].get(name, 0):
            os.truncate(folder / name, length)
        else:
            (folder / name).unlink(missing_ok=True)
    with (folder / GROWING_FILES[0]).open("a", encoding="utf-8") as file:
        file.write(saved.run["parts"]["tracker"]["held"])  # what a full disk had kept out of it
    if not (folder / BEST).exists() and (folder / f"{BEST}.old").exists():
        (folder / f"{BEST}.old").rename(folder / BEST)  # cut between the two renames of replace_folder


def remarks(saved: Saved, config: Config, base: str) -> list[str]:
    """What a user should know about going on with other options than before. base: as for `about`."""
    told = []
    if saved.run["base"] != base:
        told.append(
            f"--resume: an earlier version of this program made {saved.folder}, without a digest of 4-bit"
            " weights; the model is recognised by its other weights"
        )
    if saved.run["world"] != config.world_size and config.lora_dropout:
        told.append(
            f"--resume: {config.world_size} processes instead of {saved.run['world']} draw other random numbers for"
            " --lora_dropout"
        )
    for name in ("num_epochs", "max_steps"):
        before = option_of(saved.run, name)
        if before != getattr(config, name) and (config.lr_scheduler != "constant" or config.lr_warmup):
            told.append(
                f"--resume: --{name} {getattr(config, name)} instead of {before}: the learning rate follows it"
                " from here on"
            )
    return told
