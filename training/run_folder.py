"""The RUN's folder: cleared or rolled back when training starts, with a report when it ends."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from checkpoints import resume
from checkpoints.storage import checkpoint_steps
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
from training.bad_steps import ResumedProgress, describe_no_good_step, raise_if_failed, resumed_from
from training.job import Job


def start_run_folder(
    job: Job,
    rank_info: RankInfo,
    lock: FolderLock,
    total: int,
    facts: str,
    ready: str,
    stages: dict[str, float],
) -> NoTracker:
    """Lock and prepare the folder for the run's first step, and return the rank's tracker. Collective.

    Raises UserError if another run writes there, or has done so since the checks, or if a node does not see
    the folder.

    Args:
        job: the checked run.
        rank_info: this process.
        lock: the folder's lock, which rank 0 acquires.
        total: optimizer steps of the run.
        facts: rank 0's text for run.json.
        ready: the line to print once the folder is locked and prepared.
        stages: GiB of the fullest rank after each stage (wrap, load).
    """
    config, folder = job.config, Path(job.output_dir)
    if rank_info.rank == 0:
        lock.acquire()
        resume.check_folder_unchanged(config, job.saved)
        if job.saved is None:
            clear_output(folder)
        resume.roll_back_run(folder, job.saved)
        write_text(folder / OPTIONS, job.options_file())
        write_text(folder / FACTS, facts)
        print(ready, flush=True)
    if config.save_every or config.save_minutes:
        check_output_is_shared(folder / FACTS, rank_info)
    state = job.saved.run["parts"]["tracker"] if job.saved else {}
    tracker = make_tracker(config, rank_info.rank, total, state)
    tracker.log_stages(stages)
    return tracker


def unsaved_error(job: Job, error: OSError) -> UserError:
    """Return the error of a result that could not be written, with the checkpoint that still has it."""
    folder = Path(job.output_dir)
    return UserError(describe_unsaved(error, folder, next(iter(checkpoint_steps(folder)), None)))


def finish_run(
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
    """Write the run's report, and print the last lines. Collective.

    Raises UserError on all ranks if bad steps ended the run, or if it has no result.

    Args:
        job: the checked run.
        rank_info: this process.
        history: metrics of every step, on rank 0 also of those before the run was resumed.
        total: optimizer steps of the run.
        done: steps before the run was resumed.
        seconds: time of the steps after that.
        stages: as for `start_run_folder`.
        stopped: why the run was asked to stop, or "".
        no_result: why the run has no result to save, or "".
    """
    config, folder = job.config, Path(job.output_dir)
    if rank_info.rank == 0:
        with warn_on_full_disk(folder / PAGE):
            write_report(folder)
        saved, sampled = config.save_model and not no_result, bool(job.evaluation.prompts)
        lines = describe_end(config, history, total, done, seconds, stages, stopped, saved, sampled)
        print(lines, flush=True)
    raise_if_failed(history[done:], _resumed_progress(job).bad, config.max_bad_steps, folder, no_result)


def describe_no_result(job: Job, model: nn.Module, history: list[Metrics]) -> str:
    """Return why a finished run has no result, else "". Collective.

    The reason is that no step was good, or that weights are not finite. history: metrics of the steps after
    the run was resumed.
    """
    is_scaled = job.precision.autocast == torch.float16
    untrained = describe_no_good_step(history, _resumed_progress(job), is_scaled, Path(job.output_dir))
    return untrained or describe_not_finite(model)


def _resumed_progress(job: Job) -> ResumedProgress:
    if not job.saved:
        return ResumedProgress()
    return resumed_from(job.saved.step, job.saved.run["parts"]["guard"])
