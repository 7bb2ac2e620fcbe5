"""Options of sweep.py: those of train.py, which all trials have, and what the sweep tries."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from options import train
from options.command_line import Command
from options.config import COMPATIBILITY, FIELDS, Config
from options.declaration import REQUIRED, option, option_fields
from options.errors import UserError
from options.foreign_rules import FOREIGN
from options.step_rows import displaced_options
from options.sweep_space import Combination, Space, Values, read_space


@dataclass(frozen=True)
class SweepOptions:
    """The options that only sweep.py has."""

    # fmt: off
    space: str = option(REQUIRED, "Sweep", "YAML file of the options that trials differ in (docs/sweep.md)")
    trials: int = option(20, "Sweep", "number of trials of the whole sweep, of all workers together and with"
        " those of earlier commands; at most the combinations of the space. Unset with --sampler grid: all of"
        " them", ge=1)
    sampler: str = option("tpe", "Sweep", "how values are chosen: all combinations; at random; or by Optuna's"
        " TPE, from the losses so far", choices=("grid", "random", "tpe"))
    prune: bool = option(True, "Sweep", "stop a trial whose best evaluation so far is above the median of the"
        " finished trials at the same share of a run; needs --eval_every")
    folds: int = option(1, "Sweep", "train each trial this many times, each time without another fold of the"
        " rows, and compare the means of their losses; 1 = once, with --eval_share or --eval_dataset", ge=1)
    workers: int = option(1, "Sweep", "trials at a time on this machine, which share its GPUs evenly; the"
        " same command on other machines that see --output_dir adds theirs", ge=1, le=64)
    wandb_sweep: Path | None = option(None, "Sweep", "write the space to this file, as a sweep of Weights &"
        " Biases with the same commands, and end")
    # fmt: on


@dataclass(frozen=True)
class AllOptions(Config, SweepOptions):
    """The options of sweep.py's command line, its own first; declared for parsing, never made."""


@dataclass(frozen=True)
class Request:
    """What sweep.py is asked.

    Attributes:
        sweep: the options of sweep.py alone.
        space: what trials differ in.
        folder: where the sweep is: its journal, page, and the RUN of each trial.
        base: the command line of train.py that all trials have, split into words.
        recorded: those of its options that may change a loss, {name: text}. They identify a sweep.
        config: all options of train.py of one combination.
        remarks: lines about the space, to print once.
    """

    sweep: SweepOptions
    space: Space
    folder: Path
    base: list[str]
    recorded: dict[str, str]
    config: Config
    remarks: list[str]

    @property
    def trials(self) -> int:
        """Number of trials of the sweep."""
        return int(min(self.sweep.trials, self.space.size))

    def run_folder(self, number: int, fold: int = 0) -> Path:
        """Return the RUN of a trial; with --folds that of one of its folds, from 0."""
        folder = self.folder / f"trial-{number:04}"
        return folder / f"fold-{fold + 1}" if self.sweep.folds > 1 else folder

    def arguments(self, combination: Combination) -> list[str]:
        """Return the command line of a trial without what sweep.py adds, split into words."""
        return [*self.base, *(f"--{name}={text}" for name, text in combination.items())]

    def fold_arguments(self, fold: int) -> list[str]:
        """Return the option of a fold, from 0, as words; [] without --folds."""
        return [f"--eval_fold={fold + 1}/{self.sweep.folds}"] if self.sweep.folds > 1 else []


OWN = option_fields(SweepOptions)
COMMAND = Command(
    "sweep.py",
    "--config BASE.yaml --space SPACE.yaml [--trials N] [--option value ...]",
    "Try options of train.py: each trial is a run of it, and the best evaluation loss wins.",
    AllOptions,
    epilog="All options of train.py are taken. The same command goes on with a stopped sweep.",
    displaced=displaced_options,
    foreign=FOREIGN,
)
# Options of a run that a sweep decides itself, and why.
REFUSED = {
    "resume": "the same command goes on with a sweep",
    "overwrite": "a sweep goes on; choose another --output_dir for a new one",
    "show_rows": "it is for one run",
    "max_minutes": "a run that it stops has no result; `timeout -s INT` stops a sweep, and the same command"
    " goes on with it",
}
# Options that change the rows that an evaluation is measured on, or how rows are cut into tokens.
MEASURING = ("model_name", "llama_pro_path", "adapter", "dataset", "dataset_format", "columns", "text_column",
             "dataset_samples", "image_folder", "image_size", "images", "chat_template", "empty_thinking",
             "context_length")  # fmt: skip


# Groups of options that may differ between the commands that go on with a sweep.
UNRECORDED = ("Launch", "Checkpoints", "Output", "Profiling", COMPATIBILITY)


def parse(argv: list[str]) -> Request:
    """Return what the options in `argv` ask. Raises UserError if they are wrong; exits 0 on --help.

    Each value of the space is checked as train.py would, with the base options.
    """
    given = COMMAND.read(argv)
    words = COMMAND.split(argv)
    typed = dict(words)
    own = {name: given.pop(name) for name in OWN if name in given}
    for name in own:
        if name not in typed:  # train.py reads the same file
            raise UserError(f"--config: {name} is no option of train.py; give --{name} on the command line")
    space = read_space(own["space"])
    if twice := [name for name in space.names if name in typed]:
        raise UserError(f"--{twice[0]}: is in --space {own['space']} as well; leave one of them out")
    for name, reason in REFUSED.items():
        if given.get(name):
            raise UserError(f"--{name}: has no effect in a sweep: {reason}")
    folder = _sweep_folder(own["space"], given if "output_dir" in typed else {})
    base = [word for name, each in words if name not in (*OWN, "output_dir") for word in each]
    if "output_dir" in given and "output_dir" not in typed:  # the folder of the run that --config is from
        base.append("--output_dir=")
    sweep = SweepOptions(**({"trials": 2**31 - 1} if own.get("sampler") == "grid" else {}) | own)
    _check_grid(sweep, space)
    if sweep.folds > 1:
        _check_folds(sweep, given)
    if sweep.wandb_sweep and (unread := [name for name in ("workers", "output_dir") if name in typed]):
        raise UserError(f"--{unread[0]}: has no effect with --wandb_sweep, which runs nothing; leave it out")
    request = Request(sweep, space, folder, base, _record(given, space), Config(), [])
    configs = [_check(request, corner) for corner in space.corners()]
    _check_measured(configs[0])
    _check_cache(configs)
    remarks = _describe_measured(space, configs[0])
    return Request(sweep, space, folder, base, request.recorded, configs[0], remarks)


def _sweep_folder(space: str, given: dict) -> Path:
    """Return --output_dir, or runs/sweep-<name of the space's file>: the same command finds it again."""
    return Path(os.path.expanduser(given.get("output_dir") or f"runs/sweep-{Path(space).stem}"))


def _record(given: dict, space: Space) -> dict[str, str]:
    """Return the options that all trials have and that may change their losses, as given, {name: text}."""
    learned = (name for name in sorted(given) if FIELDS[name].metadata["group"] not in UNRECORDED)
    left_out = {*space.names, *REFUSED, "quantized_cache", "loading_workers"}
    return {name: str(given[name]) for name in learned if name not in left_out}


def _check(request: Request, corner: Combination) -> Config:
    """Return the options of a trial. Raises UserError if train.py would refuse them."""
    folds = request.fold_arguments(0)
    try:
        return train.parse([*request.arguments(corner), *folds])[0]
    except UserError as e:
        error = str(e)
    try:
        train.parse([*request.base, *folds])
    except UserError as e:
        if str(e) == error:  # whatever the space's values are
            raise
    tried = " ".join(f"--{name} {text}" for name, text in corner.items())
    raise UserError(f"--space {request.sweep.space}: with {tried}: {error}")


def _check_folds(sweep: SweepOptions, given: dict) -> None:
    """Raise UserError for an option that has no effect beside --folds."""
    for name in ("eval_share", "eval_dataset", "eval_fold"):
        if given.get(name):
            raise UserError(f"--{name}: has no effect with --folds {sweep.folds}; leave one of them out")
    if sweep.wandb_sweep:
        raise UserError("--folds: has no effect with --wandb_sweep, whose sweeps compare single runs")


def _check_grid(sweep: SweepOptions, space: Space) -> None:
    """Raise UserError if --sampler grid has a range without a step."""
    if sweep.sampler != "grid":
        return
    for each in space.dimensions:
        if not isinstance(each, Values) and (each.is_log or each.step is None):
            raise UserError(
                f"--sampler grid: {each.name} in --space {sweep.space} has no step; give it a step without"
                " log, or list its values: [value, value]"
            )


def cache_name(config: Config) -> str:
    """Return a name for packed weights: the same for trials that pack the same ones in the same way.

    Two models may have the same last part of their names, so the whole name's CRC-32 is in it.
    """
    model = Path(config.model_name).name.replace("@", "-")
    parts = (config.method.quantizer, config.n_bits, config.group_size, model)
    tower = "-tower" if config.vision_bits == 4 else ""
    new = "-new_blocks" if config.method.expansion else ""
    digest = zlib.crc32(config.model_name.encode())
    return "-".join(str(part) for part in parts if part is not None) + f"{tower}{new}-{digest:08x}"


def _check_cache(configs: list[Config]) -> None:
    """Raise UserError for a --quantized_cache that trials would fill with different packed weights."""
    names = {cache_name(config) for config in configs if config.method.quantizer}
    if configs[0].quantized_cache and len(names) > 1:
        raise UserError(
            "--quantized_cache: holds one model, packed in one way, and the trials pack in"
            f" {len(names)} ways; leave it out: each then gets a folder in the sweep's"
        )


def _check_measured(config: Config) -> None:
    """Raise UserError if trials would have no evaluation loss."""
    if not config.evaluates:
        raise UserError(
            "--eval_share, --eval_dataset or --folds is missing: a sweep compares evaluation losses"
        )


def _describe_measured(space: Space, config: Config) -> list[str]:
    """Return lines to print about options that change what is measured, and about trials that cannot stop."""
    names = [name for name in space.names if name in MEASURING]
    names += ["seed"] if "seed" in space.names and config.eval_dataset is None else []
    remarks = []
    if names:
        remarks.append(
            f"--space: {', '.join(names)} may change the rows or tokens that the evaluation loss is measured"
            " on; trials that differ in it compare only roughly"
        )
    if not config.eval_every:
        remarks.append("--eval_every 0: one evaluation, at the end of a trial, so no trial is stopped early")
    return remarks
