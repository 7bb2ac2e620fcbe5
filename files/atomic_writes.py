"""Atomic writes: files and folders are written under a temporary name and renamed once they are complete."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def staging_path(folder: Path) -> Path:
    """Return the path of the sibling <folder>.tmp, in which the contents of `folder` are written first."""
    return folder.with_name(f"{folder.name}.tmp")


def make_staging_folder(folder: Path) -> None:
    """Make `staging_path(folder)`, without what an interrupted run left in it, for `replace_folder`."""
    remove_folder(staging_path(folder))
    staging_path(folder).mkdir(parents=True)


def replace_folder(folder: Path) -> None:
    """Rename `staging_path(folder)` to `folder`, and delete the folder that had this name. Raises OSError.

    An incomplete folder never has the name. The older folder becomes <name>.old and is deleted last. If the
    renaming fails, it gets its name back.
    """
    old = folder.with_name(f"{folder.name}.old")
    remove_folder(old)
    if folder.exists():
        folder.rename(old)
    try:
        staging_path(folder).rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    remove_folder(old)


def remove_folder(folder: Path, ignore_errors: bool = True) -> None:
    """Remove a folder with its contents; of a link only the link, since its target is not ours.

    ignore_errors: raise no OSError if the folder is missing or something in it cannot be removed.
    """
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors)


@contextlib.contextmanager
def stage_files(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Yield stage(name), which returns the temporary path to write the folder's file `name` to.

    At the end of the context the files get their names, in the order of the calls. After an error all
    temporary files are removed.
    """
    paths: dict[str, Path] = {}

    def stage(name: str) -> Path:
        paths[name] = folder / f"{name}.tmp"
        # Left by an interrupted run, or a link through which another file would be overwritten.
        paths[name].unlink(missing_ok=True)
        return paths[name]

    try:
        yield stage
        for name, path in paths.items():
            path.rename(folder / name)
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises OSError that names the file."""
    try:
        with stage_files(path.parent) as stage:
            stage(path.name).write_text(text, encoding="utf-8")
    except OSError as e:
        e.filename = e.filename or str(path)  # a full disk's error has no file name
        raise


def nonfinite_to_null(value):
    """Return a copy of nested dicts and lists with None for NaN and infinity, since JSON has neither."""
    if isinstance(value, dict):
        return {name: nonfinite_to_null(each) for name, each in value.items()}
    if isinstance(value, list):
        return [nonfinite_to_null(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
