"""report.py's command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from options.command_line import Command
from options.declaration import argument


@dataclass(frozen=True)
class Options:
    """What report.py does."""

    run: Path = argument("RUN", "the --output_dir of a run of train.py")


COMMAND = Command("report.py", "RUN", "Makes RUN/report.html out of a RUN's files.", Options)


def parse(argv: list[str]) -> Path:
    """The RUN. Raises UserError; exits 0 on --help."""
    return Options(**COMMAND.read(argv)).run
