"""Score a finished run and its base model on a dataset.

    python evaluate.py runs/my-run --dataset test.jsonl
    python evaluate.py runs/my-run --dataset test.jsonl --samples 200 --metrics rouge --out results.json

The prompt of each row is the text before its last answer; answers are generated greedily. The base is the
same model with its adapters off, or, where training saved a whole model, the model that training started
from. docs/evaluation.md defines the metrics.
"""

from __future__ import annotations

import sys

from launch.program import exit_on_signals, run_command
from options.evaluate import Options, parse


def run(options: Options) -> int:
    """Score a run and its base, and print a table. Return 0, or 2 for an error that the user can fix."""
    from finished.evaluate import run  # takes seconds, so after the options are parsed

    return run(options)


def main(argv: list[str]) -> int:
    """Parse the options and run the command. Return the exit status."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
