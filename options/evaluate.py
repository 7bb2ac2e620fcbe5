"""Options of evaluate.py. Errors in them are found before torch and transformers are imported."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from options.columns import EXAMPLE, check_column_options, check_columns
from options.command_line import Command
from options.config import BASE_MATMULS, DATASET_FORMATS
from options.declaration import argument, option
from options.errors import UserError

METRICS = ("perplexity", "exact_match", "bleu", "rouge")
PACKAGES = {"bleu": ("sacrebleu", "sacrebleu"), "rouge": ("rouge_score", "rouge-score")}  # (module, on PyPI)


def parse_metrics(names: str) -> tuple[str, ...]:
    """Return the metrics named in a comma-separated text, each once, in the order of the text.

    Raises UserError for an unknown metric, or one whose package is not installed.
    """
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name not in METRICS:
            raise UserError(f"--metrics: {name!r}: must be one of {', '.join(METRICS)}")
        module, package = PACKAGES.get(name, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise UserError(f"--metrics {name}: needs the package {package}: pip install {package}")
    return chosen


@dataclass(frozen=True)
class Options:
    """The options of evaluate.py. metrics: in the order in which they were given."""

    # fmt: off
    run: str = argument("RUN", "the --output_dir of a run of train.py, or its best/ folder")
    dataset: str | None = option(None, "Data", "as train.py takes it; unset = the run's own evaluation set")
    dataset_format: str | None = option(None, "Data", "as train.py takes it; unset = the run's, if the rows"
        " have its columns", choices=DATASET_FORMATS)
    columns: str | None = option(None, "Data", "as train.py takes it; unset = the run's, where the rows have"
        " these columns", commas=True, convert=check_columns, noun=f"like {EXAMPLE}")
    text_column: str | None = option(None, "Data", "as train.py takes it; unset = the run's, where the rows"
        " have it")
    image_folder: str | None = option(None, "Data", "as train.py takes it; unset = the run's")
    samples: int = option(-1, "Data", "rows used, from the first; -1 = all", ge=1, sentinel=-1)
    metrics: tuple[str, ...] = option(METRICS, "Measurement", f"comma-separated: {', '.join(METRICS)}",
        convert=parse_metrics, commas=True)
    max_new_tokens: int = option(128, "Measurement", "longest answer, in tokens", ge=1)
    batch_size: int = option(8, "Measurement", "rows in a batch", ge=1)
    base_model: str | None = option(None, "Model", "folder or hub id of the base model, if it is not where"
        " the run had it")
    base_matmul: str = option("16bit", "Model", "matmuls with the 4-bit weights: 16bit, whatever the run was"
        " trained with, or rounded as train.py's --base_matmul says", choices=BASE_MATMULS)
    out: Path | None = option(None, "Output", "where to write the results and all answers, as JSON")
    verbose: bool = option(False, "Output", "tracebacks with errors")
    # fmt: on


COMMAND = Command(
    "evaluate.py",
    "RUN [--dataset TEXT] [--option value ...]",
    "Measure a finished run and its base model on a dataset.",
    Options,
)


def parse(argv: list[str]) -> Options:
    """Return the options in `argv`. Raises UserError if they are wrong or do not go together.

    Exits with status 0 on --help.
    """
    options = Options(**COMMAND.read(argv))
    for name in ("dataset_format", "columns", "text_column"):
        if getattr(options, name) is not None and options.dataset is None:
            raise UserError(f"--{name}: has no effect without --dataset")
    check_column_options(options.columns, options.text_column)
    return options
