"""Output folder of an export: checked before writing, and filled completely or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from files.disk_room import check_free_space
from files.names import ADAPTER_CONFIG, CONFIG, OPTIONS
from files.output_folder import clear_output, holds_run
from options.errors import UserError

SPARE_BYTES = 2**20  # for headers, index and model card
MOVED_LAST = (CONFIG, ADAPTER_CONFIG)  # a folder with one of these counts as loadable


def check_output_folder(out: Path, overwrite: bool, names: Iterable[str] = ()) -> None:
    """Raise UserError if `out` holds a run, or, without --overwrite, a model or a file of `names`."""
    if (out / OPTIONS).exists():  # even --overwrite does not replace a training run
        raise UserError(f"--out {out}: holds a run of train.py; choose another folder")
    existing_output = (
        "a model" if holds_run(out) else next((name for name in names if (out / name).exists()), None)
    )
    if existing_output and not overwrite:
        raise UserError(
            f"--out {out}: holds {existing_output} already; choose another folder, or add --overwrite"
        )


def check_space(out: Path, nbytes: int) -> None:
    """Raise UserError if the disk has no room for `nbytes` and SPARE_BYTES. `out` need not exist."""
    try:
        existing = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
        check_free_space(existing, nbytes + SPARE_BYTES)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}") from None


@contextlib.contextmanager
def staging_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder in `out`; at the end move its files into `out`, replacing a model there.

    After an error, removes the temporary folder and the folders that were created for it. Raises UserError if
    files that must not be overwritten appeared in the meantime.
    """
    created_folders = [p for p in [out.absolute(), *out.absolute().parents] if not p.exists()]
    staging = out / f".export-{os.getpid()}.tmp"
    for leftover in out.glob(".export-*.tmp"):
        with _try_lock(leftover) as has_lock:
            if has_lock:  # its export was killed: the OS released the lock
                shutil.rmtree(leftover, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        with _try_lock(staging):
            yield staging
            check_output_folder(out, overwrite, [path.name for path in staging.iterdir()])
            clear_output(out)
            for path in sorted(staging.iterdir(), key=lambda p: p.name in MOVED_LAST):
                path.replace(out / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in created_folders:
            with contextlib.suppress(OSError):  # not empty, as after success, or not created yet
                folder.rmdir()


@contextlib.contextmanager
def _try_lock(folder: Path) -> Iterator[bool]:
    """Try to lock a folder; yield whether this process has the lock.

    Yields False if another process holds it or has just removed the folder, if opening is not permitted, or
    if the file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_lock = True
        except OSError:
            has_lock = False
        yield has_lock
