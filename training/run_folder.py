"""The RUN's folder: cleared or cut to a checkpoint when training starts, its page and last lines when it
ends."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from checkpoints import resume
from checkpoints.storage import steps_in
from checkpoints.training_state import describe_not_finite
from files.atomic_writes import write_text
from files.disk_room import warn_on_full_disk
from files.lock import FolderLock
from files.names import OPTIONS
from files.output_folder import clear_output
from launch.nodes import check_output_is_shared
from launch.ranks import RankInfo
from monitoring.messages import describe_end, describe_unsaved
from monitoring.metrics import Metrics
from monitoring.report import PAGE, write_report
from monitoring.run_facts import FACTS
from monitoring.tracking import NoTracker, make_tracker
from options.errors import UserError
from training.bad_steps import Resumed, conclude, no_good_step, resumed_from
from training.job import Job


def open_run(
    job: Job,
    rank_info: RankInfo,
    lock: FolderLock,
    total: int,
    facts: str,
    ready: str,
    stages: dict[str, float],
) -> NoTracker:
    """Makes the folder what the run's first step needs, and returns the rank's tracker. Collective.

    Args:
        lock: held by rank 0 from here on.
        total: optimizer steps of the run.
        facts: what run.json says, of rank 0.
        ready: the line to print once the folder is the run's.
        stages: GiB of the fullest rank after wrapping and loading, by name.

    Raises UserError if another run writes there, or has done so since the checks, or if a node does not see
    the folder.
    """
    config, folder = job.config, Path(job.output_dir)
    if rank_info.rank == 0:
        lock.acquire()
        resume.check_still_so(config, job.saved)
        if job.saved is None:
            clear_output(folder)
        resume.tidy(folder, job.saved)
        write_text(folder / OPTIONS, job.options_file())
        write_text(folder / FACTS, facts)
        print(ready, flush=True)
    if config.save_every or config.save_minutes:
        check_output_is_shared(folder / FACTS, rank_info)
    state = job.saved.run["parts"]["tracker"] if job.saved else {}
    tracker = make_tracker(config, rank_info.rank, total, state)
    tracker.stages(stages)
    return tracker


def unsaved(job: Job, error: OSError) -> UserError:
    """What to tell of a result that could not be written: where it can be saved from."""
    folder = Path(job.output_dir)
    return UserError(describe_unsaved(error, folder, next(iter(steps_in(folder)), None)))


def close_run(
    job: Job,
    rank_info: RankInfo,
    history: list[Metrics],
    total: int,
    done: int,
    seconds: float,
    stages: dict[str, float],
    stopped: str,
    no_result: str,
) -> None:
    """Makes the run's page, and tells how it went. Collective.

    Args:
        history: metrics of every step, on rank 0 also of those before the run was resumed.
        total: optimizer steps of the run.
        done: steps before it was resumed; seconds: of the steps after them.
        stages: as for `open_run`.
        stopped: why the run was asked to stop, or "".
        no_result: why nothing was saved of what was to be saved, or "".

    Raises UserError on all ranks if bad steps ended the run, or if it has no result.
    """
    config, folder = job.config, Path(job.output_dir)
    if rank_info.rank == 0:
        with warn_on_full_disk(folder / PAGE):
            write_report(folder)
        saved, sampled = config.save_model and not no_result, bool(job.evaluation.prompts)
        print(
            describe_end(config, history, total, done, seconds, stages, stopped, saved, sampled), flush=True
        )
    conclude(history[done:], _resumed(job).bad, config.max_bad_steps, folder, no_result)


def why_no_result(job: Job, model: nn.Module, history: list[Metrics]) -> str:
    """Return why a finished run has no result (no good step, or non-finite weights), else "". history: the
    steps that were made. Collective."""
    scaled = job.precision.autocast == torch.float16
    untrained = no_good_step(history, _resumed(job), scaled, Path(job.output_dir))
    return untrained or describe_not_finite(model)


def _resumed(job: Job) -> Resumed:
    return resumed_from(job.saved.step, job.saved.run["parts"]["guard"]) if job.saved else Resumed()
