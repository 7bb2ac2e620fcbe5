"""--resume: finds the checkpoint to resume from, and brings the run's files back to its step.

checkpoints/same_run.py compares the run with that of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from checkpoints.storage import (
    GROWING_FILES,
    MANIFEST,
    Checkpoint,
    DamagedCheckpoint,
    checkpoint_folder,
    checkpoint_steps,
    find_newest_checkpoint,
    read_checkpoint,
    remove_checkpoints,
)
from files.names import ADAPTER_CONFIG, BEST, BLOCKS, CONFIG, METRICS
from files.output_folder import check_output, holds_run, output_folder
from monitoring.metrics import read_metrics
from options.config import CHECKPOINTS, Config
from options.errors import UserError


def resume_after_restart(config: Config) -> Config:
    """Return the config, with --resume auto and without --overwrite if torchrun has restarted the run.

    A --resume that the user gave stays. Raises UserError if --max-restarts is given, but not --output_dir, or
    --overwrite for a folder with checkpoints: a restart could not find those of this start.
    """
    attempt, max_restarts = (
        int(os.environ.get(f"TORCHELASTIC_{n}", "0")) for n in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    assert config.output_dir is not None
    folder = Path(config.output_dir)
    is_default_name = re.fullmatch(r"runs/\d{8}-\d{6}-\w+", config.output_dir) and not folder.exists()
    if max_restarts and is_default_name:
        raise UserError(
            "--output_dir: is needed under torchrun --max-restarts: a restart resumes the run in this folder"
        )
    if max_restarts and not attempt and config.overwrite and checkpoint_steps(folder):
        raise UserError(
            f"--overwrite: {config.output_dir} has checkpoints, which a restart by torchrun could not tell"
            " from this run's; remove it, or choose another --output_dir"
        )
    if attempt:
        return dataclasses.replace(config, resume=config.resume or "auto", overwrite=False)
    return config


def _check_may_start_over(run: Path) -> None:
    """Raise UserError if a RUN without a complete checkpoint holds a result or a damaged checkpoint."""
    contents = None
    if any((run / name).exists() for name in (ADAPTER_CONFIG, CONFIG, BLOCKS)):
        contents = "a finished run without checkpoints"
    elif any((checkpoint_folder(run, step) / MANIFEST).exists() for step in checkpoint_steps(run)):
        contents = "no complete checkpoint"
    if contents:
        raise UserError(f"--resume auto: {run} holds {contents}; choose another --output_dir")


def find_checkpoint(config: Config) -> Checkpoint | None:
    """Return the verified checkpoint that --resume names; None without --resume, or if `auto` finds none.

    Raises UserError if a folder given as --resume holds no complete checkpoint or is not in --output_dir, and
    if `auto` finds none in a RUN with a result or a damaged checkpoint.
    """
    run = output_folder(config)
    if config.resume is None:
        return None
    if config.resume == "auto":
        checkpoint = find_newest_checkpoint(run, warn=print)
        if checkpoint is None:
            if holds_run(run):
                _check_may_start_over(run)
            print(f"--resume auto: {run} has no checkpoint yet; starting from the beginning")
        return checkpoint
    path = Path(config.resume).expanduser()
    if not path.is_dir():
        raise UserError(f"--resume {config.resume}: no such folder")
    is_checkpoint = (path / MANIFEST).is_file() or path.parent.name == CHECKPOINTS
    if (path.parent.parent if is_checkpoint else path).resolve() != run.resolve():
        raise UserError(
            f"--resume {config.resume}: is not in --output_dir {run}; a run can only be resumed in its own"
            " folder"
        )
    try:
        checkpoint = read_checkpoint(path) if is_checkpoint else find_newest_checkpoint(path, warn=print)
    except DamagedCheckpoint as e:
        raise UserError(f"--resume {config.resume}: no complete checkpoint ({e})") from None
    if checkpoint is None:
        raise UserError(f"--resume {config.resume}: holds no complete checkpoint")
    return checkpoint


def check_folder_unchanged(config: Config, checkpoint: Checkpoint | None) -> None:
    """Raise UserError if another run has written in --output_dir since `checkpoint` was looked for.

    Call it once no other run can write there any more. checkpoint: The one to resume from, if any.
    """
    run = output_folder(config)
    if checkpoint is None:
        check_output(run, config.overwrite or config.resume is not None)
        if config.resume:
            _check_may_start_over(run)
    elif not (checkpoint.folder / MANIFEST).exists():
        raise UserError(f"--output_dir {run}: another run wrote there in the meantime; run the command again")


def check_growing_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Raise UserError if a file in GROWING_FILES is a link, or does not reach the checkpoint's step.

    Resuming cuts these files; through a link it would cut another file. folder: The RUN.
    """
    lengths, step = checkpoint.run["files"], checkpoint.step
    for name in GROWING_FILES:
        path, length = folder / name, lengths.get(name, 0)
        if path.is_symlink():
            raise UserError(f"{path}: is a symbolic link; only regular files and folders are used")
        if length and (not path.is_file() or path.stat().st_size < length):
            raise UserError(f"{path}: is missing or truncated: it ends before step {step} of the checkpoint")
    path, held = folder / METRICS, checkpoint.run["parts"]["tracker"]["held"]
    length = lengths.get(METRICS, 0)
    n_lines = len(read_metrics(path, length)) if length else 0
    if n_lines + held.count("\n") != step:
        raise UserError(f"{path}: has {n_lines} lines, which are not those of step {step} of the checkpoint")


def roll_back_run(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Undo what a RUN wrote after the checkpoint; without one, only remove all checkpoints. Raises OSError.

    Removes later checkpoints, cuts GROWING_FILES, and brings back a best/ whose replacement was interrupted.
    """
    remove_checkpoints(folder, after=checkpoint.step if checkpoint else 0)
    if checkpoint is None:
        return
    for name in GROWING_FILES:
        if length := checkpoint.run["files"].get(name, 0):
            os.truncate(folder / name, length)
        else:
            (folder / name).unlink(missing_ok=True)
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(checkpoint.run["parts"]["tracker"]["held"])  # lines that a full disk had kept out of it
    if not (folder / BEST).exists() and (folder / f"{BEST}.old").exists():
        # The run was interrupted between the two renames of replace_folder.
        (folder / f"{BEST}.old").rename(folder / BEST)
