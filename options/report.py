"""Options of report.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from options.command_line import Command
from options.declaration import argument


@dataclass(frozen=True)
class Options:
    """The options of report.py."""

    run: Path = argument("RUN", "the --output_dir of a run of train.py")


COMMAND = Command("report.py", "RUN", "Make RUN/report.html from the files of a RUN.", Options)


def parse(argv: list[str]) -> Path:
    """Return the RUN in `argv`. Raises UserError if it is missing or more is given; exits 0 on --help."""
    return Options(**COMMAND.read(argv)).run
