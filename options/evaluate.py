"""evaluate.py's command line: what can be wrong with it is found here, before torch and transformers are imported."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from options.command_line import command_parser, suggest, with_underscores
from options.config import DATASET_FORMATS
from options.errors import UserError

METRICS = ("perplexity", "exact_match", "bleu", "rouge")
PACKAGES = {"bleu": ("sacrebleu", "sacrebleu"), "rouge": ("rouge_score", "rouge-score")}  # module, on PyPI


@dataclass(frozen=True)
class Options:
    """The command line. samples: -1 = all rows; dataset, dataset_format: None = the run's own."""

    run: str
    dataset: str | None
    dataset_format: str | None
    samples: int
    metrics: list[str]
    max_new_tokens: int
    batch_size: int
    base_model: str | None
    out: Path | None
    verbose: bool


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "evaluate.py",
        "RUN [--dataset TEXT] [--option value ...]",
        "Measures a finished run on a dataset, its base model beside it.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", nargs="?", help="the --output_dir of a run, or its best/ folder")
    add("--dataset", metavar="TEXT", help="as train.py takes it; unset = the run's own evaluation set")
    add(
        "--dataset_format",
        metavar="NAME",
        help="as train.py takes it; unset = the run's, where rows have its columns",
    )
    add("--samples", metavar="N", type=int, default=-1, help="rows used, from the first; -1 = all [-1]")
    add(
        "--metrics",
        metavar="NAMES",
        default=",".join(METRICS),
        help=f"comma-separated: {', '.join(METRICS)} [all]",
    )
    add("--max_new_tokens", metavar="N", type=int, default=128, help="longest answer, in tokens [128]")
    add("--batch_size", metavar="N", type=int, default=8, help="rows computed at once [8]")
    add(
        "--base_model",
        metavar="TEXT",
        help="folder or hub id of the base model, if it is not where the run had it",
    )
    add("--out", metavar="FILE", help="where to write the results and all answers, as JSON")
    add("--verbose", action="store_true", help="tracebacks with errors")
    return parser


def parse(argv: list[str]) -> Options:
    """Raises UserError; exits 0 on --help."""
    args, rest = _parser().parse_known_args(with_underscores(argv))
    if rest:
        known = suggest(rest[0].split("=")[0], vars(args)) if rest[0].startswith("-") else "; give one RUN"
        raise UserError(f"unknown option {rest[0]}{known}")
    if not args.run:
        raise UserError("give a RUN, the --output_dir of a run of train.py; see --help")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be positive")
    if args.samples == 0 or args.samples < -1:
        raise UserError(f"--samples {args.samples}: must be positive, or -1")
    if args.dataset_format not in (None, *DATASET_FORMATS):
        raise UserError(f"--dataset_format: {args.dataset_format!r} is none of {', '.join(DATASET_FORMATS)}")
    if args.dataset_format is not None and args.dataset is None:
        raise UserError("--dataset_format: has no effect without --dataset")
    out = None if args.out is None else Path(args.out).expanduser()
    return Options(**vars(args) | {"metrics": check_metrics(args.metrics), "out": out})


def check_metrics(names: str) -> list[str]:
    """--metrics as a list. Raises UserError for an unknown one, and for one whose package is not installed."""
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name not in METRICS:
            raise UserError(f"--metrics: {name!r} is none of {', '.join(METRICS)}")
        module, package = PACKAGES.get(name, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise UserError(f"--metrics {name}: needs the package {package}: pip install {package}")
    return chosen
