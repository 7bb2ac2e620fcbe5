"""Options of train.py."""

from __future__ import annotations

import os

from options.command_line import Command
from options.config import Config
from options.foreign_rules import FOREIGN
from options.presets import HELP, add_preset, describe_added
from options.resolve import resolve
from options.step_rows import displaced_options


def _output_dir_of(path: str) -> dict[str, str]:
    """Return {"output_dir": its folder} if the --config file is the config.yaml of a RUN, else {}.

    The RUN may have been moved, so its folder overrides the output_dir in the file.
    """
    folder, name = os.path.split(os.path.abspath(os.path.expanduser(path)))
    is_run = name == "config.yaml" and os.path.isfile(os.path.join(folder, "run.json"))
    return {"output_dir": folder} if is_run else {}


COMMAND = Command(
    "train.py",
    "[--option value ...]",
    "Fine-tune a language model too big for one GPU. Without options: a small demo run.",
    Config,
    epilog="Options may be written with - for _, and switches without `true`.",
    implied_by_path=_output_dir_of,
    displaced=displaced_options,
    foreign=FOREIGN,
    pages=HELP,
)


def parse(argv: list[str]) -> tuple[Config, list[str]]:
    """Return (Config with all defaults filled in, remarks to print once) for the options in `argv`.

    Raises UserError if they are wrong or do not go together; exits with status 0 on --help and
    --help_presets.
    """
    given = COMMAND.read(argv)
    completed = add_preset(COMMAND.read, dict(COMMAND.split(argv)), given)
    config, remarks = resolve(completed)
    return config, [*describe_added(given, completed), *remarks]
