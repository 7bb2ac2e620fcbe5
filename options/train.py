"""train.py's command line."""

from __future__ import annotations

from options.command_line import Command
from options.config import Config
from options.resolve import resolve

COMMAND = Command(
    "train.py",
    "[--option value ...]",
    "Fine-tune a language model too big for one GPU. Without options: a small demo run.",
    Config,
    epilog="Options may be written with - for _, and switches without `true`.",
)


def parse(argv: list[str]) -> tuple[Config, list[str]]:
    """(the resolved configuration, remarks to print once). Raises UserError; exits 0 on --help."""
    return resolve(COMMAND.read(argv))
