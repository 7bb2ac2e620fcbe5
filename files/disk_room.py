"""Checks that a folder is writable and has room, and writes that do not fail a run on a full disk."""

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
    """Raises UserError if the folder cannot be made or written to. Creates nothing: other runs may be
    checking as well."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(folder)  # raises, as exists() does not, where a part of the path is a file
        existing = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise UserError(f"{option} {folder}: cannot be written ({getattr(e, 'strerror', e)})") from None


def check_room(folder: Path, needed: int) -> None:
    """Raises OSError if the folder's disk has no room for so many bytes: one that ran full in the middle
    would stop everything else that writes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"No space left: {format_bytes(needed)} are needed, {format_bytes(free)} free"
        )


@contextlib.contextmanager
def despite_full_disk(path: Path) -> Iterator[None]:
    """Around the writing of something that report.py can make later: without it a run is none the worse."""
    try:
        yield
    except OSError as e:
        if e.errno not in FULL_DISK:
            raise
        print(f"WARNING: {path}: {e.strerror}; it is not written", file=sys.stderr, flush=True)


def append(path: Path, text: str, say: Callable[[str], None]) -> None:
    """Adds lines to a file of the RUN, all or, with a warning, if the disk is full, none."""
    try:
        with path.open("ab", buffering=0) as file:
            append_bytes(file, text.encode())
    except OSError as e:
        if e.errno not in FULL_DISK:
            raise
        say(f"WARNING: {path}: {e.strerror}; lines of it are lost, and training goes on")


def append_bytes(file: io.FileIO, data: bytes) -> None:
    """Adds to the end of a file, all, or nothing where an error is raised: what reads it finds whole
    lines."""
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        file.truncate(end)
        raise
