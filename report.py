"""Write a run's report again from the RUN's files: <output_dir>/report.html.

    python report.py RUN

train.py writes it at the end. This also works while the run is training.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch.program import run_command
from options.report import parse


def run(folder: Path) -> int:
    """Write report.html of the RUN in `folder`. Return 0, or 2 for an error that the user can fix."""
    from monitoring.report import run  # takes seconds, so after the options are parsed

    return run(folder)


def main(argv: list[str]) -> int:
    """Parse the options and run the command. Return the exit status."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
