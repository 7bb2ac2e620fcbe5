"""The files below a folder of data, through links: never in a circle, and at most MAX_FOLDER_ENTRIES of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from files.links import points_outside
from options.errors import UserError
from options.limits import MAX_FOLDER_ENTRIES

NO_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def files_below(folder: str) -> list[str]:
    """Return the paths of the files that may hold rows, sorted. Hidden ones, NO_ROWS and folders such as
    __pycache__ are left out; a folder that links lead to as well is read once."""
    is_new = _first_visits(folder)
    paths = _walk(folder, lambda path: not os.path.basename(path).startswith((".", "__")) and is_new(path))
    names = ((path, os.path.basename(path)) for path in paths)
    return sorted(path for path, name in names if not name.startswith(".") and name not in NO_ROWS)


def files_matching(folder: str, pattern: str) -> list[str]:
    """Return the paths of the files that a pattern means, sorted. `*`, `?`, `[]` and `**` mean what they do
    in `glob.glob`; unlike there, links that lead in circles are left."""
    parts = [part for part in pattern.split("/") if part not in ("", ".")]

    def used(path: str) -> set[int]:
        return _used_parts(parts, os.path.relpath(path, folder).split(os.sep))

    def enters(path: str) -> bool:
        return min(used(path), default=len(parts)) < len(parts) and not _is_circle(path, folder)

    return sorted(path for path in _walk(folder, enters) if len(parts) in used(path))


def check_links(folder: str, root: str) -> None:
    """Raise UserError for a link in or below the folder that leads out of root, the folder of a recipe."""
    real_root, is_new = os.path.realpath(root), _first_visits(folder)

    def stays(path: str) -> bool:
        real = Path(os.path.realpath(path))
        if points_outside(Path(path)) and not real.is_relative_to(real_root):
            raise UserError(
                f"--dataset {path}: is a link out of the recipe's folder, to {real}; give that as --dataset"
            )
        return is_new(path)

    for path in _walk(folder, stays):
        stays(path)


def _walk(folder: str, enters: Callable[[str], bool]) -> Iterator[str]:
    """Yield the paths of files, in the folder and in those below it for which enters(path) is true."""
    number = 0
    for place, folders, names in os.walk(folder, followlinks=True):
        number += len(folders) + len(names)
        if number > MAX_FOLDER_ENTRIES:
            raise UserError(
                f"--dataset {folder}: more than {MAX_FOLDER_ENTRIES:,} files and folders are in it, or where its"
                " links lead; name a smaller one"
            )
        # Folders before links to them: the order on the disk does not decide which of the two is read.
        paths = sorted((os.path.islink(os.path.join(place, name)), name) for name in folders)
        folders[:] = [name for _, name in paths if enters(os.path.join(place, name))]
        yield from (path for name in names if os.path.isfile(path := os.path.join(place, name)))


def _first_visits(folder: str) -> Callable[[str], bool]:
    """Return a function that says whether a path is seen for the first time, by this or another name."""
    seen = {os.path.realpath(folder)}

    def is_new(path: str) -> bool:
        before = len(seen)
        seen.add(os.path.realpath(path))
        return len(seen) > before

    return is_new


def _is_circle(path: str, folder: str) -> bool:
    """Whether a path is a link to one of the folders that lead to it from `folder`."""
    if not os.path.islink(path):
        return False
    real, place = os.path.realpath(path), os.path.dirname(path)
    while os.path.realpath(place) != real:
        if os.path.relpath(place, folder) == ".":
            return False
        place = os.path.dirname(place)
    return True


def _used_parts(parts: list[str], names: list[str]) -> set[int]:
    """Return how many parts of a pattern these names of a path, from the first, may stand for."""
    used = _past_stars(parts, {0})
    for name in names:
        fitting = [i for i in used if i < len(parts) and _fits(name, parts[i])]
        used = _past_stars(parts, {i if parts[i] == "**" else i + 1 for i in fitting})
    return used


def _past_stars(parts: list[str], used: set[int]) -> set[int]:
    """The same, and those behind `**`, which may stand for no folder."""
    for i, part in enumerate(parts):
        if i in used and part == "**":
            used.add(i + 1)
    return used


def _fits(name: str, part: str) -> bool:
    return fnmatchcase(name, part) and (part.startswith(".") or not name.startswith("."))
