"""Write a run's report again from the RUN's files, or a page that compares several runs.

    python report.py RUN                    # RUN/report.html
    python report.py RUN RUN RUN            # compare.html

train.py writes a run's report at its end. This also works while runs are training.
"""

from __future__ import annotations

import sys

from launch.program import run_command
from options.report import Options, parse


def run(options: Options) -> int:
    """Write the page. Return 0, or 2 for an error that the user can fix."""
    from monitoring.report import run  # takes seconds, so after the options are parsed

    return run(options)


def main(argv: list[str]) -> int:
    """Parse the options and run the command. Return the exit status."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
