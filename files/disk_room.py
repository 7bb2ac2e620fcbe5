"""Checks that a folder is writable and has free space, and writes that do not fail a run on a full disk."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.memory import format_bytes
from options.errors import FULL_DISK, UserError


def check_writable(folder: Path, option: str) -> None:
    """Raise UserError if the folder cannot be made or written to.

    Creates no folder, since other runs may be checking the same one.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(folder)  # unlike exists(), raises if a parent is a file
        existing = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise UserError(f"{option} {folder}: cannot be written ({getattr(e, 'strerror', e)})") from None


def check_free_space(folder: Path, needed: int) -> None:
    """Raise OSError if the folder's disk has less than `needed` bytes free.

    A disk that fills up in the middle of a write would stop everything else that writes to it.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"No space left: {format_bytes(needed)} are needed, {format_bytes(free)} free"
        )


@contextlib.contextmanager
def warn_on_full_disk(path: Path) -> Iterator[None]:
    """Within the context, turn the OSError of a full disk into a printed warning that `path` is not written.

    For files that report.py can make again later.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in FULL_DISK:
            raise
        print(f"WARNING: {path}: {e.strerror}; it is not written", file=sys.stderr, flush=True)


def append_lines(path: Path, text: str, log: Callable[[str], None]) -> None:
    """Append lines to a file. If the disk is full, append nothing and log a warning. Else raises OSError."""
    try:
        with path.open("ab", buffering=0) as file:
            append_bytes(file, text.encode())
    except OSError as e:
        if e.errno not in FULL_DISK:
            raise
        log(f"WARNING: {path}: {e.strerror}; lines of it are lost, and training goes on")


def append_bytes(file: io.FileIO, data: bytes) -> None:
    """Append all bytes to a file, or nothing if OSError is raised, so that its readers find whole lines."""
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        file.truncate(end)
        raise
