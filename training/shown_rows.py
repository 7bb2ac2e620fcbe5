"""--show_rows: print what a run would learn, and start nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from data.packing import make_sampler
from data.row_text import describe_examples
from files.tokenizer import read_tokenizer
from launch.program import print_error
from monitoring.messages import describe_data
from options.config import Config
from options.errors import UserError, needs_no_traceback
from training.job import Job


def show_rows(config: Config, check: Callable[[Config], Job], remarks: list[str]) -> int:
    """Check a run, print its first examples, and return the exit status: 0, or 2 for the user's error.

    Writes nothing, also if --output_dir holds a run.

    Args:
        config: the run's options.
        check: returns the checked run. Raises UserError.
        remarks: lines to print before the job's own.
    """
    # Of what --output_dir holds nothing is read or written.
    config = dataclasses.replace(config, overwrite=True, resume=None, log_to="stdout")
    try:
        job = check(config)
    except (UserError, OSError) as e:
        if not needs_no_traceback(e):
            raise
        return print_error(e, config.verbose)
    tokenizer = read_tokenizer(job.files.folder, config.model_name)
    rows, config = job.rows, job.config
    data = describe_data(rows, make_sampler(config, rows, 0, config.world_size), config.context_length)
    print(*remarks, *job.remarks, data, *describe_examples(rows, config.show_rows, tokenizer), sep="\n")
    return 0
