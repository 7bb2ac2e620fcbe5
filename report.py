"""Makes the page about a run, <output_dir>/report.html, again out of the RUN's files, also while it is training.

    python report.py RUN

train.py makes it at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch.program import run_command
from options.report import parse


def run(folder: Path) -> int:
    """Returns the exit status: 0, or 2 for something the user can put right."""
    from monitoring.report import run  # takes seconds: wrong options and --help are answered by now

    return run(folder)


def main(argv: list[str]) -> int:
    """Options in, exit status out."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
