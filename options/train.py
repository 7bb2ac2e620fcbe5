"""Options of train.py."""

from __future__ import annotations

from options.command_line import Command
from options.config import Config
from options.foreign_rules import FOREIGN
from options.presets import HELP, add_preset
from options.resolve import resolve
from options.run_folders import recorded_run
from options.step_rows import displaced_options


def _output_dir_of(path: str) -> dict[str, str]:
    """Return {"output_dir": its folder} if the --config file is the config.yaml of a RUN, else {}.

    The RUN may have been moved, so its folder overrides the output_dir in the file.
    """
    folder = recorded_run(path)
    return {} if folder is None else {"output_dir": folder}


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
    given, typed = COMMAND.read(argv), dict(COMMAND.split(argv))
    given, told = add_preset(COMMAND.read, typed, COMMAND.config_file(argv), given)
    config, remarks = resolve(given)
    return config, [*told, *remarks]
