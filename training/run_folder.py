"""The RUN's folder: cleared or rolled back when training starts, with a report when it ends."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import nn

from checkpoints import resume
from checkpoints.storage import find_newest_checkpoint
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
from monitoring.report import write_report
from monitoring.run_facts import FACTS, record_saved_step
from monitoring.tracking import NoTracker, make_tracker
from options.errors import UserError
from options.report import PAGE
from training.bad_steps import ResumedProgress, describe_no_good_step, raise_if_failed, resumed_from
from training.job import Job


def start_run_folder(
    job: Job,
    rank_info: RankInfo,
    lock: FolderLock,
    total_steps: int,
    facts_json: str,
    ready_line: str,
) -> NoTracker:
    """Lock the folder, clear it or roll it back, write the options; return this rank's tracker. Collective.

    Raises UserError if another run writes there, or has done so since the checks, or if a node does not see
    the folder.

    Args:
        job: the checked run.
        rank_info: this process.
        lock: the folder's lock, which rank 0 acquires.
        total_steps: optimizer steps of the run.
        facts_json: rank 0's text for run.json.
        ready_line: the line to print once the folder is locked and prepared.
    """
    config, folder = job.config, Path(job.output_dir)
    if rank_info.rank == 0:
        lock.acquire()
        resume.check_folder_unchanged(config, job.saved)
        if job.saved is None:
            clear_output(folder)
        resume.roll_back_run(folder, job.saved)
        write_text(folder / OPTIONS, job.options_file())
        write_text(folder / FACTS, facts_json)
        record_saved_step(folder, None)
        print(ready_line, flush=True)
    if config.save_every or config.save_minutes:
        check_output_is_shared(folder / FACTS, rank_info)
    state = job.saved.run["parts"]["tracker"] if job.saved else {}
    tracker = make_tracker(config, rank_info.rank, total_steps, state)
    tracker.log_facts(facts_json)
    return tracker


def unsaved_error(job: Job, error: OSError) -> UserError:
    """Return a UserError for a result that could not be written; it names the newest whole checkpoint."""
    folder, newest = Path(job.output_dir), None
    with contextlib.suppress(UserError, OSError):  # none can be read
        newest = find_newest_checkpoint(folder, warn=lambda line: None)
    return UserError(describe_unsaved(error, folder, newest.step if newest else None))


def finish_run(
    job: Job,
    rank_info: RankInfo,
    history: list[Metrics],
    total_steps: int,
    steps_done: int,
    seconds: float,
    gib: dict[str, float],
    stop_reason: str,
    no_result: str,
) -> None:
    """Write the run's report and print its last lines; then raise UserError if the run failed. Collective.

    It failed if bad steps ended it, or if it has no result.

    Args:
        job: the checked run.
        rank_info: this process.
        history: metrics of every step, on rank 0 also of those before the run was resumed.
        total_steps: optimizer steps of the run.
        steps_done: steps before the run was resumed.
        seconds: time of the steps after that.
        gib: memory after each stage, and predicted, as in run.json.
        stop_reason: why the run was asked to stop, or "".
        no_result: why the run has no result to save, or "".
    """
    config, folder = job.config, Path(job.output_dir)
    if rank_info.rank == 0:
        saved, sampled = config.save_model and not no_result, bool(job.evaluation.prompts)
        if saved and not stop_reason:
            with warn_on_full_disk(folder / FACTS):
                record_saved_step(folder, len(history))
        with warn_on_full_disk(folder / PAGE):
            write_report(folder)
        lines = describe_end(
            config, history, total_steps, steps_done, seconds, gib, stop_reason, saved, sampled
        )
        print(lines, flush=True)
    bad = _resumed_progress(job).bad
    raise_if_failed(history[steps_done:], bad, config.max_bad_steps, folder, no_result, _is_scaled(job))


def describe_no_result(job: Job, model: nn.Module, history: list[Metrics]) -> str:
    """Return an error line if no step was good or a trained weight is not finite, else "". Collective.

    history: metrics of the steps after the run was resumed.
    """
    untrained = describe_no_good_step(history, _resumed_progress(job), _is_scaled(job), Path(job.output_dir))
    return untrained or describe_not_finite(model)


def _is_scaled(job: Job) -> bool:
    """Return whether the loss is scaled, for fp16."""
    return job.precision.autocast == torch.float16


def _resumed_progress(job: Job) -> ResumedProgress:
    if not job.saved:
        return ResumedProgress()
    return resumed_from(job.saved.step, job.saved.run["parts"]["guard"])
