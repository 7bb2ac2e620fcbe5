"""--show_rows: print what a run would learn, and start nothing."""

from __future__ import annotations

import dataclasses

from data.packing import make_sampler
from data.row_text import LEGEND, describe_examples
from monitoring.messages import describe_data
from options.config import Config
from options.declaration import AUTO
from training.job import Job


def without_output(config: Config) -> Config:
    """Return the options of a run that is only checked: nothing in --output_dir is read or written.

    No size is tried: `auto` is a batch of 1.
    """
    config = dataclasses.replace(config, overwrite=True, resume=None, log_to="stdout")
    return dataclasses.replace(config, batch_size=1) if config.batch_size == AUTO else config


def show_rows(job: Job) -> None:
    """Print the lines about a run's data, and its first --show_rows examples."""
    rows, config = job.rows, job.config
    if config.context_length == AUTO:
        config = dataclasses.replace(config, context_length=int(rows.lengths().max()))
    data = describe_data(rows, make_sampler(config, rows, 0, config.world_size), config.context_length)
    examples = describe_examples(rows, config.show_rows, job.read_tokenizer())
    print(data + job.evaluation.describe(), LEGEND, *examples, sep="\n")
