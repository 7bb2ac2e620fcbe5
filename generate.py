"""Ask a finished run and its base the same, and see both answers.

    python generate.py runs/my-run --prompt "Name three colours."       base and tuned, side by side
    python generate.py runs/one runs/two --prompts questions.txt        several adapters over one loaded base
    python generate.py runs/my-run                                      a conversation at the terminal

Prompts go through the template of the run's own training. docs/architecture.md has the map.
"""

from __future__ import annotations

import sys

from launch.program import run_command
from options.generate import Options, parse


def run(options: Options) -> int:
    """Returns the exit status: 0, or 2 for something the user can put right."""
    from finished.generate import run  # takes seconds: wrong options and --help are answered by now

    return run(options)


def main(argv: list[str]) -> int:
    """Options in, exit status out."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
