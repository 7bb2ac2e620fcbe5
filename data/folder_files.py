"""Find the files below a folder of data, at most MAX_FOLDER_ENTRIES of them.

Links are followed, but never in a circle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from files.links import points_outside
from options.errors import UserError
from options.limits import MAX_FOLDER_ENTRIES

# JSON files that no rows are read from.
METADATA_FILES = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def list_data_files(folder: str) -> list[str]:
    """Return the sorted paths, each beginning with `folder`, of all files below it that may hold rows.

    Hidden files, METADATA_FILES and folders such as __pycache__ are left out. A folder that links also lead
    to is read once. Raises UserError for more than MAX_FOLDER_ENTRIES.
    """
    is_new = _make_first_visit_check(folder)
    paths = _walk(folder, lambda path: not os.path.basename(path).startswith((".", "__")) and is_new(path))
    names = ((path, os.path.basename(path)) for path in paths)
    return sorted(path for path, name in names if not name.startswith(".") and name not in METADATA_FILES)


def glob_data_files(folder: str, pattern: str) -> list[str]:
    """Return the sorted paths, each beginning with `folder`, of the files below it that match; [] if none.

    pattern: relative to the folder. `*`, `?`, `[]` and `**`, any number of folders, mean the same as in
    `glob.glob(..., recursive=True)`. Unlike there, links in a circle are not followed. Raises UserError for
    more than MAX_FOLDER_ENTRIES.
    """
    parts = [part for part in pattern.split("/") if part not in ("", ".")]

    def matched(path: str) -> set[int]:
        return _find_matching_lengths(parts, os.path.relpath(path, folder).split(os.sep))

    def should_enter(path: str) -> bool:
        return min(matched(path), default=len(parts)) < len(parts) and not _links_to_ancestor(path, folder)

    return sorted(path for path in _walk(folder, should_enter) if len(parts) in matched(path))


def check_links(folder: str, root: str) -> None:
    """Raise UserError for a link in or below the folder that leads out of `root`, the folder of a recipe.

    Raises it for more than MAX_FOLDER_ENTRIES, too.
    """
    real_root, is_new = os.path.realpath(root), _make_first_visit_check(folder)

    def check_link(path: str) -> bool:
        """Raise UserError for a path that leads out of root; else return whether it is new."""
        real = Path(os.path.realpath(path))
        if points_outside(Path(path)) and not real.is_relative_to(real_root):
            raise UserError(
                f"--dataset {path}: is a link out of the recipe's folder, to {real}; give that as --dataset"
            )
        return is_new(path)

    for path in _walk(folder, check_link):
        check_link(path)


def _walk(folder: str, should_enter: Callable[[str], bool]) -> Iterator[str]:
    """Yield the files in the folder, and in the folders below it for which should_enter(path) is true.

    Raises UserError for more than MAX_FOLDER_ENTRIES.
    """
    count = 0
    for parent, folders, names in os.walk(folder, followlinks=True):
        count += len(folders) + len(names)
        if count > MAX_FOLDER_ENTRIES:
            raise UserError(
                f"--dataset {folder}: more than {MAX_FOLDER_ENTRIES:,} files and folders are in it, or where"
                " its links lead; name a smaller one"
            )
        # Folders come before links to them, so the order on the disk does not decide which of them is read.
        paths = sorted((os.path.islink(os.path.join(parent, name)), name) for name in folders)
        folders[:] = [name for _, name in paths if should_enter(os.path.join(parent, name))]
        yield from (path for name in names if os.path.isfile(path := os.path.join(parent, name)))


def _make_first_visit_check(folder: str) -> Callable[[str], bool]:
    """Return a function that tells whether it gets a path for the first time, under any of its names."""
    seen = {os.path.realpath(folder)}

    def is_new(path: str) -> bool:
        before = len(seen)
        seen.add(os.path.realpath(path))
        return len(seen) > before

    return is_new


def _links_to_ancestor(path: str, folder: str) -> bool:
    """Return whether a path is a link to one of its own parents, up to `folder`."""
    if not os.path.islink(path):
        return False
    real, parent = os.path.realpath(path), os.path.dirname(path)
    while os.path.realpath(parent) != real:
        if os.path.relpath(parent, folder) == ".":
            return False
        parent = os.path.dirname(parent)
    return True


def _find_matching_lengths(parts: list[str], names: list[str]) -> set[int]:
    """Return every k such that the first k parts of a pattern match a whole path; `**` can give several."""
    matched = _skip_double_stars(parts, {0})
    for name in names:
        fitting = [i for i in matched if i < len(parts) and _name_matches(name, parts[i])]
        matched = _skip_double_stars(parts, {i if parts[i] == "**" else i + 1 for i in fitting})
    return matched


def _skip_double_stars(parts: list[str], matched: set[int]) -> set[int]:
    """Add to `matched` each k + 1 whose parts[k] is `**`, which may match no folder; return it."""
    for i, part in enumerate(parts):
        if i in matched and part == "**":
            matched.add(i + 1)
    return matched


def _name_matches(name: str, part: str) -> bool:
    return fnmatchcase(name, part) and (part.startswith(".") or not name.startswith("."))
