"""The RUN's folder when training starts: locked, rid of an earlier run's files or cut to a checkpoint."""

from __future__ import annotations

from pathlib import Path

from checkpoints import resume
from files.atomic_writes import write_text
from files.lock import Alone
from files.output_folder import clear_output
from monitoring.run_facts import FACTS
from options.config import dump_yaml
from training.job import Job


def open_run_folder(job: Job, lock: Alone, facts: str) -> None:
    """Makes the folder what the run's first step needs, on rank 0. lock: held from here on; facts: what run.json says.
    Raises UserError if another run writes there, or has done so since the checks."""
    folder = Path(job.output_dir)
    lock.take()
    resume.check_still_so(job.config, job.saved)
    if job.saved is None:
        clear_output(folder)
    resume.tidy(folder, job.saved)
    write_text(folder / "config.yaml", dump_yaml(job.config))
    write_text(folder / FACTS, facts)
