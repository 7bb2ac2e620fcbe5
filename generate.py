"""Ask a finished run and its base the same prompts and print both answers.

    python generate.py runs/my-run --prompt "Name three colours."       base and tuned, side by side
    python generate.py runs/one runs/two --prompts questions.txt        several adapters over one loaded base
    python generate.py runs/one runs/two --prompts rows.jsonl --out table.html      with times and scores
    python generate.py runs/my-run                                      a conversation at the terminal

Prompts use the template of the run's training. docs/architecture.md has the map.
"""

from __future__ import annotations

import sys

from launch.program import run_command
from options.generate import Options, parse


def run(options: Options) -> int:
    """Print the answers of the base and the runs. Return 0, or 2 for an error that the user can fix."""
    from finished.generate import run  # takes seconds, so after the options are parsed

    return run(options)


def main(argv: list[str]) -> int:
    """Parse the options and run the command. Return the exit status."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
