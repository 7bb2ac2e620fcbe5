"""From a finished run to a model that others load: a merged model folder, or the adapter with a model card.

    python export.py runs/x --to merged --out my-model
    python export.py runs/x --to gguf-ready --out my-model
    python export.py runs/x --to adapter --out my-adapter --push_to_hub me/my-adapter

Weights are read, merged and written one at a time. docs/export.md says which base to merge into.
"""

from __future__ import annotations

import sys

from launch.program import exit_on_signals, run_command
from options.export import Options, parse


def run(options: Options) -> int:
    """Returns the exit status: 0, or 2 for something the user can put right."""
    from finished.export import run  # takes seconds: wrong options and --help are answered by now

    return run(options)


def main(argv: list[str]) -> int:
    """Options in, exit status out."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
