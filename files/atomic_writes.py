"""Files and folders that are whole or not there: written under a temporary name, renamed when whole."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def beside(folder: Path) -> Path:
    """Where what is to be `folder` is made."""
    return folder.with_name(f"{folder.name}.tmp")


def fresh_folder(folder: Path) -> None:
    """Makes an empty folder beside `folder`, to be filled and put in its place by `replace_folder`."""
    remove(beside(folder))
    beside(folder).mkdir(parents=True)


def replace_folder(folder: Path) -> None:
    """Puts the whole folder beside `folder` in its place. At no time does a half written one have the name;
    the older one is deleted last (as <name>.old)."""
    old = folder.with_name(f"{folder.name}.old")
    remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        beside(folder).rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    remove(old)


def remove(folder: Path, ignore_errors: bool = True) -> None:
    """Removes a folder, if it is there and lets itself be; of a link only the link, as what it leads to is
    not ours."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Gives stage(name): where to write what is to be `name` in the folder. Once all are whole they get their
    names, in the order of the calls; after an error none of them is left."""
    paths: dict[str, Path] = {}

    def stage(name: str) -> Path:
        paths[name] = folder / f"{name}.tmp"
        paths[name].unlink(missing_ok=True)  # a cut run's, or a link, which would have another file written
        return paths[name]

    try:
        yield stage
        for name, path in paths.items():
            path.rename(folder / name)
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Raises OSError that names the file."""
    try:
        with staged(path.parent) as stage:
            stage(path.name).write_text(text, encoding="utf-8")
    except OSError as e:
        e.filename = e.filename or str(path)  # a disk that is full names none
        raise


def as_json(value):
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {name: as_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
