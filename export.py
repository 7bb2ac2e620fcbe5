"""Export a finished run for other programs: a merged model folder, or the adapter with a model card.

    python export.py runs/x --to merged --out my-model
    python export.py runs/x --to gguf-ready --out my-model
    python export.py runs/x --to adapter --out my-adapter --push_to_hub me/my-adapter

Weights are read, merged and written one at a time. docs/export.md explains which base to merge into.
"""

from __future__ import annotations

import sys

from launch.program import exit_on_signals, run_command
from options.export import Options, parse


def run(options: Options) -> int:
    """Export a run to --out and, on request, upload it. Return 0, or 2 for an error that the user can fix."""
    from finished.export import run  # takes seconds, so after the options are parsed

    return run(options)


def main(argv: list[str]) -> int:
    """Parse the options and run the command. Return the exit status."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
