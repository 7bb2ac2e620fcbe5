"""Options of plan.py: those of train.py, and the machine to plan for."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from options.command_line import Command
from options.config import Config
from options.declaration import format_value, option, option_fields
from options.errors import UserError
from options.foreign_rules import FOREIGN
from options.presets import HELP, add_preset
from options.resolve import resolve
from options.step_rows import displaced_options


@dataclass(frozen=True)
class PlanOptions:
    """The options that only plan.py has."""

    # fmt: off
    gpus: int = option(1, "Plan", "number of GPUs, all in one host", ge=1, le=1024)
    gpu: str | None = option(None, "Plan", "kind of GPU: t4, 4090, h100 ...; unset = this machine's, or an"
        " RTX 4090 if it has none")
    gib: float | None = option(None, "Plan", "GiB of memory of each GPU; unset = what --gpu has", gt=0)
    host_gib: float | None = option(None, "Plan", "GiB of host memory; unset = what a run takes of it is"
        " printed, but not judged", gt=0)
    cpus: int | None = option(None, "Plan", "CPUs of the host, which the ranks share: as many processes"
        " compile; unset = 4 per rank", ge=1)
    new_blocks: int | None = option(None, "Plan", "number of new blocks of a Llama-Pro train type, for a"
        " model that block_expansion.py has not expanded yet", ge=1)
    images_per_row: int | None = option(None, "Plan", "images of a row, for a model that takes images; a pack"
        " has more, up to --images_per_pack; unset = 1 with --images true, else none", ge=1)
    curve: str | None = option(None, "Plan", "draw the peak against this, in the terminal and as a picture",
        choices=("context", "batch"))
    curve_file: Path | None = option(None, "Plan", "file of that picture, .png, .pdf or .svg; unset ="
        " curve.png")
    probe: bool = option(False, "Plan", "run two steps with random weights on this machine's GPUs too, and"
        " print what they take beside the plan, and the time of a step, an epoch of --dataset and the run")
    json: bool = option(False, "Plan", "print one JSON object (docs/plan.md)")
    # fmt: on


@dataclass(frozen=True)
class AllOptions(Config, PlanOptions):
    """The options of plan.py's command line, its own first; declared for parsing, never made."""


@dataclass(frozen=True)
class Request:
    """What plan.py is asked.

    Attributes:
        plan: the options of plan.py alone.
        given: the options of train.py that were given, {name: converted value}.
        config: all options of train.py, resolved as far as they do not depend on the machine.
        typed: the command line for train.py, as `Command.split` returns it.
        remarks: lines on what a preset gives, and on options that train.py does not read.
    """

    plan: PlanOptions
    given: dict
    config: Config
    typed: list[tuple[str, list[str]]]
    remarks: list[str]

    def command(self, changes: dict) -> str:
        """Return the command of the run with other values for some options, {name: value}, to be pasted."""
        words = [word for name, words in self.typed if name not in changes for word in words]
        for name, value in changes.items():
            words += [f"--{name}", format_value(value)]
        return shlex.join(["python", "train.py", *words])


PICTURES = (".png", ".pdf", ".svg")  # formats of --curve_file
OWN = option_fields(PlanOptions)
COMMAND = Command(
    "plan.py",
    "--model_name MODEL [--gpus N] [--gpu NAME] [--gib X] [--option value ...]",
    "Say what a run of train.py takes and whether it fits. It needs no GPU and no weights.",
    AllOptions,
    epilog="All options of train.py are taken. Without --context_length the longest that fits is searched.",
    displaced=displaced_options,
    foreign=FOREIGN,
    pages=HELP,
)


def parse(argv: list[str]) -> Request:
    """Return what the options in `argv` ask. Raises UserError if they are wrong; exits 0 on --help."""
    given = COMMAND.read(argv)
    words = COMMAND.split(argv)
    given, told = add_preset(COMMAND.read, dict(words), COMMAND.config_file(argv), given)
    own = {name: given.pop(name) for name in OWN if name in given}
    for name in own:
        if name not in dict(words):  # train.py reads the same file
            raise UserError(f"--config: {name} is no option of train.py; give --{name} on the command line")
    if not {"model_name", "llama_pro_path"} & given.keys():
        raise UserError("--model_name is missing; see --help")
    if "curve_file" in own and "curve" not in own:
        raise UserError("--curve_file: has no effect without --curve context or --curve batch")
    file = own.get("curve_file")
    if file and file.suffix.lower() not in PICTURES:
        raise UserError(f"--curve_file {file}: must end in one of {', '.join(PICTURES)}")
    if "images_per_row" in own:
        if given.get("images") == "false":
            raise UserError("--images_per_row: contradicts --images false; leave one of them out")
        given["images"] = "true"  # as train.py finds it in the rows
    config, remarks = resolve(given)
    if "new_blocks" in own and not config.method.expansion:
        raise UserError(f"--new_blocks: has no effect with --train_type {config.train_type}")
    typed = [(name, value) for name, value in words if name not in OWN]
    return Request(PlanOptions(**own), given, config, typed, [*told, *remarks])
