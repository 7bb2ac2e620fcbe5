"""The folder that an export is written into: checked before, and filled as a whole or not at all."""

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

SPARE = 2**20  # bytes, for headers, index and card
LAST = (CONFIG, ADAPTER_CONFIG)  # each makes its folder loadable


def check_unused(out: Path, overwrite: bool, names: Iterable[str] = ()) -> None:
    """Raises UserError if the folder holds a run, or what only --overwrite replaces: a model, or a file of
    one of these names."""
    if (out / OPTIONS).exists():  # even --overwrite does not replace a training run
        raise UserError(f"--out {out}: holds a run of train.py; choose another folder")
    there = "a model" if holds_run(out) else next((name for name in names if (out / name).exists()), None)
    if there and not overwrite:
        raise UserError(f"--out {out}: holds {there} already; choose another folder, or add --overwrite")


def check_space(out: Path, nbytes: int) -> None:
    """Raises UserError if the folder's disk has no room for that many bytes."""
    existing = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    try:
        check_free_space(existing, nbytes + SPARE)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}") from None


@contextlib.contextmanager
def whole_or_nothing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder within `out`, whose files move into `out` at the end, in the place of a model that
    is there. After an error nothing is left of it, nor of the folders that were made for it. Raises UserError
    where they would replace what is not to be overwritten, which may have come meanwhile."""
    made = [p for p in [out.absolute(), *out.absolute().parents] if not p.exists()]
    temporary = out / f".export-{os.getpid()}.tmp"
    for left in out.glob(".export-*.tmp"):
        with _locked(left) as free:
            if free:  # of an export that was killed: its lock went with it
                shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        with _locked(temporary):
            yield temporary
            check_unused(out, overwrite, [path.name for path in temporary.iterdir()])
            clear_output(out)
            for path in sorted(temporary.iterdir(), key=lambda p: p.name in LAST):
                path.replace(out / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # holds something, as after a success, or was not made yet
                folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder to itself within: not if another holds its lock or has just removed
    it, if it may not be opened, or if there are no locks on its file system."""
    with contextlib.ExitStack() as opened:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
