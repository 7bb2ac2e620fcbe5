"""--show_rows: print what a run would learn, and start nothing."""

from __future__ import annotations

import dataclasses

from data.packing import make_sampler
from data.row_text import LEGEND, describe_examples
from monitoring.messages import describe_data
from options.config import Config
from training.job import Job


def without_output(config: Config) -> Config:
    """Return the options of a run that is only checked: nothing in --output_dir is read or written."""
    return dataclasses.replace(config, overwrite=True, resume=None, log_to="stdout")


def show_rows(job: Job) -> None:
    """Print the lines about a run's data, and its first --show_rows examples."""
    rows, config = job.rows, job.config
    data = describe_data(rows, make_sampler(config, rows, 0, config.world_size), config.context_length)
    examples = describe_examples(rows, config.show_rows, job.read_tokenizer())
    print(data + job.evaluation.describe(), LEGEND, *examples, sep="\n")
