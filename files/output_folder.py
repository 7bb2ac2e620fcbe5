"""Checks of --output_dir before a run writes there, and removal of an earlier run's files."""

from __future__ import annotations

import contextlib
from pathlib import Path

from files.disk_room import check_writable
from files.names import (
    BEST,
    EVENTS,
    MODEL_FILES,
    PROCESSOR_FILES,
    RUN_FILES,
    SAMPLE_IMAGES,
    SCORE,
    SMALL_MODEL_FILES,
    TOKENIZER_FILES,
)
from options.config import CHECKPOINTS, Config
from options.errors import UserError


def output_folder(config: Config) -> Path:
    """Return --output_dir as a Path. `resolve` must have set it."""
    assert config.output_dir is not None
    return Path(config.output_dir)


def holds_run(folder: Path) -> bool:
    """Return whether a folder holds files named like those of a run or a model."""
    return any(True for pattern in RUN_FILES + MODEL_FILES for _ in folder.glob(pattern))


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise UserError if a folder is not writable, has a link as subfolder or, unless `overwrite`, a run.

    The subfolders are those that a run writes and removes.
    """
    check_writable(folder, "--output_dir")
    for name in (CHECKPOINTS, "wandb", EVENTS, SAMPLE_IMAGES):
        if (folder / name).is_symlink():
            raise UserError(
                f"--output_dir {folder}: its {name} is a symbolic link; only regular files and folders are"
                " used"
            )
    if holds_run(folder) and not overwrite:
        raise UserError(
            f"--output_dir {folder}: holds a run already; choose another folder, or add --overwrite"
        )


def clear_output(folder: Path) -> None:
    """Make the folder, and remove an earlier run's files and folder `best` from it, but not its checkpoints.

    Incomplete files are removed as well; files of others stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Beside no run or model, a tokenizer is the user's.
    copied = (*PROCESSOR_FILES, *TOKENIZER_FILES) if holds_run(folder) else ()
    for pattern in RUN_FILES + MODEL_FILES + copied:
        for path in (*folder.glob(pattern), *folder.glob(f"{pattern}.tmp")):
            path.unlink()
    for name in (EVENTS, SAMPLE_IMAGES):
        with contextlib.suppress(OSError):  # it does not exist, or holds files of others
            (folder / name).rmdir()
    for name in (BEST, f"{BEST}.tmp", f"{BEST}.old"):
        if (folder / name).is_symlink():  # its target is not ours
            (folder / name).unlink()
        for pattern in (*RUN_FILES, *MODEL_FILES, *SMALL_MODEL_FILES, SCORE, "*.tmp"):
            for path in (folder / name).glob(pattern):
                path.unlink()
        with contextlib.suppress(OSError):  # it does not exist, or holds files of others
            (folder / name).rmdir()
