"""train.py's command line."""

from __future__ import annotations

import os

from options.command_line import Command
from options.config import Config
from options.resolve import resolve


def _run_of(path: str) -> dict[str, str]:
    """A RUN's own config.yaml is about the folder that it lies in, wherever that was moved to."""
    folder, name = os.path.split(os.path.abspath(os.path.expanduser(path)))
    is_run = name == "config.yaml" and os.path.isfile(os.path.join(folder, "run.json"))
    return {"output_dir": folder} if is_run else {}


COMMAND = Command(
    "train.py",
    "[--option value ...]",
    "Fine-tune a language model too big for one GPU. Without options: a small demo run.",
    Config,
    epilog="Options may be written with - for _, and switches without `true`.",
    known_by_place=_run_of,
)


def parse(argv: list[str]) -> tuple[Config, list[str]]:
    """(the resolved configuration, remarks to print once). Raises UserError; exits 0 on --help."""
    return resolve(COMMAND.read(argv))
