"""Measures a finished run on a dataset, its base model beside it.

    python evaluate.py runs/my-run --dataset test.jsonl
    python evaluate.py runs/my-run --dataset test.jsonl --samples 200 --metrics perplexity,rouge --out results.json

Answers are generated greedily to the prompt of each row, which is what comes before its last answer. The base is
the same model with its adapters off; where training saved a whole model, the model that it started from.
docs/evaluation.md says what the metrics are.
"""

from __future__ import annotations

import sys

from launch.program import exit_on_signals, run_command
from options.evaluate import Options, parse


def run(options: Options) -> int:
    """Returns the exit status: 0, or 2 for something the user can put right."""
    from finished.evaluate import run  # takes seconds: wrong options and --help are answered by now

    return run(options)


def main(argv: list[str]) -> int:
    """Options in, exit status out."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
