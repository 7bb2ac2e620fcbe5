"""Runs a trial of a sweep: train.py in a process of its own, watched through its metrics.jsonl.

A run that is not promising, or whose sweep stops, gets SIGTERM: it finishes its step and writes a checkpoint.
A trial that is taken over continues from it.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from checkpoints.storage import checkpoint_steps
from options import train
from options.config import CHECKPOINTS, Config
from options.errors import UserError
from options.sweep import Request, cache_name
from training.sweep_metrics import MetricsFile
from training.sweep_pool import Stop
from training.sweep_study import Study, Trial

POLL_SECONDS = 1.0
WAIT_SECONDS = 5.0  # between looks at the trials of others
PROGRAM = [sys.executable, str(Path(__file__).parents[1] / "train.py")]
LOGS, CACHE = "logs", "quantized"


@dataclass(frozen=True)
class Ended:
    """How one run of a trial ended.

    Attributes:
        loss: its best evaluation loss, if it ran to its end.
        reason: why it has none, or "".
        is_pruned, is_stopped: whether it was stopped as not promising; whether the sweep let go of it.
    """

    loss: float | None = None
    reason: str = ""
    is_pruned: bool = False
    is_stopped: bool = False


def run_trial(request: Request, study: Study, trial: Trial, gpus: dict[str, str], stop: Stop) -> str:
    """Run a trial to its end and record it. Return a line about its end; "" if it was let go of.

    Args:
        request: what sweep.py was asked.
        study: records the trial.
        trial: one that this worker has claimed.
        gpus: the environment variables that give it its GPUs.
        stop: the request to stop the sweep.
    """
    losses, folds = list(trial.losses), request.sweep.folds
    for fold in range(len(losses), folds):
        ended = _run(request, study, trial, fold, gpus, stop)
        if ended.is_stopped:
            study.release(trial.number)
            return ""
        if ended.is_pruned:
            study.prune(trial.number, ended.reason)
            return f"stopped: {ended.reason}"
        if ended.loss is None:
            study.fail(trial.number, ended.reason)
            return f"failed: {ended.reason}"
        losses.append(ended.loss)
        study.record_fold(trial.number, tuple(losses))
    study.complete(trial.number, tuple(losses))
    each = f", the mean of {', '.join(f'{loss:.4f}' for loss in losses)}" if folds > 1 else ""
    return f"evaluation loss {sum(losses) / folds:.4f}{each}"


def _run(request: Request, study: Study, trial: Trial, fold: int, gpus: dict[str, str], stop: Stop) -> Ended:
    """Run train.py for one fold of a trial, from 0, and watch it. Return how it ended."""
    folder = request.run_folder(trial.number, fold)
    try:
        arguments = run_arguments(request, trial, fold, study.day, folder)
    except UserError as e:  # a combination that the corners of a large space do not have
        return Ended(reason=str(e))
    config = train.parse(arguments)[0]
    log = request.folder / LOGS / f"{folder.relative_to(request.folder)}.log".replace("/", "-")
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as output:
        began = output.tell()
        process = start_run([*PROGRAM, *arguments], output.fileno(), gpus, study.worker.descriptor)
    metrics = MetricsFile(folder, config)
    try:
        is_pruned, is_mine = _watch(process, metrics, study, trial.number, fold, stop)
    finally:
        if process.poll() is None:  # this worker failed
            process.terminate()
            process.wait()
    for share, loss in metrics.new_evaluations() if is_mine else ():
        study.report(trial.number, fold, share, loss)
    error = _find_error(log, began, process.returncode) if process.returncode else ""
    return _judge(folder, config, error, is_pruned, is_stopped=not is_mine or bool(stop.count))


def _judge(folder: Path, config: Config, error: str, is_pruned: bool, is_stopped: bool) -> Ended:
    """Return how a run ended.

    Args:
        folder: the RUN.
        config: its options.
        error: the line with which it failed, or "".
        is_pruned, is_stopped: whether it got SIGTERM as not promising; because the sweep lets go of it.
    """
    metrics = MetricsFile(folder, config)  # read as a whole: a resumed run has cut what it repeats
    metrics.read_all()
    if not metrics.is_complete or error:
        if is_pruned:
            if not (config.save_every or config.save_minutes):  # the only checkpoint is that of the signal
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            reason = f"above the median, at {metrics.share / 10:.0f}% of the run"
            return Ended(is_pruned=True, reason=reason)
        if is_stopped:
            return Ended(is_stopped=True)
    if error:
        return Ended(reason=error)
    if not metrics.has_ended:
        return Ended(reason=f"train.py was stopped after step {metrics.step:,} of {metrics.total_steps:,}")
    if not math.isfinite(metrics.best):
        return Ended(reason="no evaluation loss is a number")
    return Ended(loss=metrics.best)


def _watch(
    process: subprocess.Popen, metrics: MetricsFile, study: Study, number: int, fold: int, stop: Stop
) -> tuple[bool, bool]:
    """Report a run's evaluations until it ends. Return (whether it was pruned, whether it is still ours).

    It gets SIGTERM if it is not promising, if another worker has taken the trial over, or if the sweep stops;
    and once more at the second request to stop.
    """
    is_pruned, is_mine, sent = False, True, 0
    while _wait(process) is None:
        is_mine = is_mine and study.is_mine(number)
        for share, loss in metrics.new_evaluations():
            is_pruned = (is_mine and study.report(number, fold, share, loss)) or is_pruned
        if sent < (wanted := max(stop.count, int(is_pruned or not is_mine))):
            process.send_signal(signal.SIGTERM)
            sent = wanted
    return is_pruned, is_mine


def _find_error(log: Path, began: int, status: int) -> str:
    """Return the line with which a run failed.

    Args:
        log: what runs of the trial printed.
        began: bytes of the log before this run.
        status: its exit status; -N if signal N ended it.
    """
    with log.open("rb") as file:
        file.seek(began)
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    how = f"status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
    return errors[-1] if errors else f"train.py ended with {how}; see {log}"


def run_arguments(request: Request, trial: Trial, fold: int, day: str, folder: Path) -> list[str]:
    """Return the command line of a run of a trial, split into words.

    Args:
        request: what sweep.py was asked.
        trial: the trial.
        fold: from 0.
        day: --chat_date of all trials, unless the base names one.
        folder: its RUN.
    """
    arguments = [*request.arguments(trial.combination), *request.fold_arguments(fold)]
    config = train.parse(arguments)[0]
    if config.chat_date is None:
        arguments.append(f"--chat_date={day}")
    if config.method.quantizer and not config.quantized_cache:
        arguments.append(f"--quantized_cache={request.folder / CACHE / cache_name(config)}")
    if config.log_to == "wandb" and config.group is None:
        arguments += [f"--group={request.folder.name}", f"--name={folder.relative_to(request.folder)}"]
    again = "--resume=auto" if checkpoint_steps(folder) else "--overwrite=true"
    return [*arguments, f"--output_dir={folder}", again]


def check_run(request: Request, gpus: dict[str, str]) -> None:
    """Let train.py check the model, the data and the options of a trial on this machine. It writes nothing.

    Raises UserError with the line with which train.py refuses them.

    Args:
        request: what sweep.py was asked.
        gpus: the environment variables that give a run its GPUs.
    """
    arguments = [*request.arguments(next(request.space.corners())), *request.fold_arguments(0)]
    command = [*PROGRAM, *arguments, f"--output_dir={request.folder}", "--show_rows=1"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | gpus,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"train.py ended with status {done.returncode}"]
        raise UserError(lines[-1].removeprefix("error: "))


def start_run(command: list[str], output: int, gpus: dict[str, str], descriptor: int) -> subprocess.Popen:
    """Start a run that gets SIGTERM when this process dies, and holds the worker's lock until it has ended.

    It has a session of its own: a terminal's Ctrl-C reaches it only through the sweep.

    Args:
        command: its words.
        output: the descriptor of its log.
        gpus: the environment variables that give it its GPUs.
        descriptor: the worker's locked file.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | gpus,
        pass_fds=(descriptor,),
        start_new_session=True,
        preexec_fn=_end_with_parent(),
    )


def _end_with_parent() -> partial | None:
    """Return the call that a new process makes to get SIGTERM at its parent's death; None but on Linux."""
    if sys.platform != "linux":
        return None
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    return partial(ctypes.CDLL(None).prctl, set_parent_death_signal, int(signal.SIGTERM))


def _wait(process: subprocess.Popen) -> int | None:
    """Return a process's exit status; None if it has not ended within POLL_SECONDS."""
    try:
        return process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None
