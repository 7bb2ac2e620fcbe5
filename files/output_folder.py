"""--output_dir before a run writes there: whether it may, and an earlier run's files removed."""

from __future__ import annotations

import contextlib
from pathlib import Path

from files.disk_room import check_writable
from files.names import BEST, COMPANIONS, MODEL_FILES, RUN_FILES, SCORE
from options.config import CHECKPOINTS, Config
from options.errors import UserError


def output_folder(config: Config) -> Path:
    """--output_dir, which `resolve` has set."""
    assert config.output_dir is not None
    return Path(config.output_dir)


def holds_run(folder: Path) -> bool:
    return any(True for pattern in RUN_FILES + MODEL_FILES for _ in folder.glob(pattern))


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises UserError if the folder holds a run and may not be replaced, or cannot be written, or has a link
    where a run writes and removes files."""
    check_writable(folder, "--output_dir")
    for name in (CHECKPOINTS, "wandb"):
        if (folder / name).is_symlink():
            raise UserError(
                f"--output_dir {folder}: its {name} is a link; a run writes in folders of its own"
            )
    if holds_run(folder) and not overwrite:
        raise UserError(
            f"--output_dir {folder}: holds a run already; choose another folder, or add --overwrite"
        )


def clear_output(folder: Path) -> None:
    """Makes the folder, and removes from it the files of an earlier run, whole or cut, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in RUN_FILES + MODEL_FILES:
        for path in (*folder.glob(pattern), *folder.glob(f"{pattern}.tmp")):
            path.unlink()
    for name in (BEST, f"{BEST}.tmp", f"{BEST}.old"):
        if (folder / name).is_symlink():  # what it leads to is not ours
            (folder / name).unlink()
        for pattern in (*RUN_FILES, *MODEL_FILES, *COMPANIONS, SCORE, "*.tmp"):
            for path in (folder / name).glob(pattern):
                path.unlink()
        with contextlib.suppress(OSError):  # there is none, or it holds files of others
            (folder / name).rmdir()
