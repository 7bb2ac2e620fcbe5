"""Find the files below a folder of data, at most MAX_FOLDER_ENTRIES of them, and check their names.

Links are followed, but never in a circle.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import yaml

from files.links import points_outside
from options.data_files import KINDS, PROSE, file_suffix, unpacked_name
from options.errors import UserError, join_names
from options.limits import MAX_FOLDER_ENTRIES

RECIPE_HINT = "write a recipe with data_files (docs/data.md)"
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")  # train-00000-of-00002.parquet
# In the names of files that are not to be trained on, such as test_1.csv.
HELD_OUT = re.compile(r"(?<![^\W_])(test|dev|val|valid|validation|eval)(?![^\W_])", re.IGNORECASE)
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
    parts = _split_parts(pattern)

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


def read_configs(folder: str) -> list[dict]:
    """Return the `configs` of .huggingface.yaml, or else of the YAML header of the folder's README.md.

    An entry that cannot be parsed is {"unreadable": True}.
    """
    try:
        with open(os.path.join(folder, "README.md"), encoding="utf-8", errors="replace") as file:
            first, *lines = file.read(2**20).lstrip().split("\n")
        header = list(takewhile(lambda line: line.rstrip() != "---", lines))
        text = "\n".join(header) if first.rstrip() == "---" and len(header) < len(lines) else ""
    except OSError:
        text = ""
    with (
        contextlib.suppress(OSError),
        open(os.path.join(folder, ".huggingface.yaml"), encoding="utf-8") as file,
    ):
        text = file.read(2**20)
    try:
        configs = (yaml.safe_load(text) or {}).get("configs")
    except (yaml.YAMLError, AttributeError, RecursionError):
        configs = [{"unreadable": True}] if "configs:" in text else None  # `datasets` reports the fault
    configs = configs if isinstance(configs, list) else [configs] if configs else []
    return [config if isinstance(config, dict) else {"unreadable": True} for config in configs]


def describe_choices(folder: str, paths: list[str]) -> str:
    """Return what to give as --dataset, if not all files of a folder can be read together.

    A pattern is proposed unless it would join files to test with those to train on. paths: those of the
    folder's data files.
    """
    names = [os.path.relpath(path, folder) for path in paths if file_suffix(path) in KINDS]
    if not names or any(HELD_OUT.search(name) for name in names):
        return f"name one file or a pattern of files, or {RECIPE_HINT}"
    name = min(names, key=lambda name: (name.count(os.sep), name))
    pattern = os.path.join(folder, "**" if os.sep in name else "", f"*{file_suffix(name)}")
    return f"name one file or a pattern such as '{pattern}', or {RECIPE_HINT}"


def list_patterns(data_files: Any, split: str) -> list[str]:
    """Return the patterns for the files of a split in `data_files` of a configuration from `read_configs`."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    entries = [each.get("path") if isinstance(each, dict) and each.get("split") == split else each
               for each in entries]  # fmt: skip
    listed = chain.from_iterable(each if isinstance(each, list) else [each] for each in entries)
    return [each for each in listed if isinstance(each, str)]


def check_packed_twins(folder: str, paths: list[str]) -> None:
    """Raise UserError if a file is there twice, packed and unpacked or packed in two ways."""
    seen: dict[str, str] = {}
    for path in paths:
        twin = seen.setdefault(unpacked_name(path), path)
        if twin != path:
            names = " and ".join(os.path.relpath(each, folder) for each in (twin, path))
            raise UserError(
                f"--dataset {folder}: {names} may hold the same rows; {describe_choices(folder, paths)}"
            )


def check_shards(folder: str, paths: list[str], pattern: str = "**") -> None:
    """Raise UserError if names such as train-00000-of-00003.parquet show that a file is missing.

    A file counts as missing only if the pattern, relative to the folder, would match it. So a pattern can
    leave out parts of a set, as train-00000-* does.
    """
    parts = _split_parts(pattern)
    sets: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        if match := SHARD.fullmatch(path):
            before, number, total, after = match.groups()
            sets.setdefault((before, total, after), set()).add(int(number))
    for (before, total, after), numbers in sets.items():
        missing = sorted({*range(int(total))} - numbers) if int(total) <= MAX_FOLDER_ENTRIES else [0]
        names = (os.path.relpath(f"{before}-{i:05d}-of-{total}{after}", folder) for i in missing)
        if name := next((name for name in names if _matches(parts, name)), None):
            raise UserError(
                f"--dataset {folder}: {name} is missing: {len(numbers)} of {int(total)} files; add it, name"
                f" one file or a pattern that does not match {os.path.basename(name)}, or {RECIPE_HINT}"
            )


def describe_unread_names(folder: str, paths: list[str]) -> str:
    """Return a remark on files without a suffix, which are not read; "" if there are none."""
    names = [os.path.basename(path) for path in paths]
    unread = [name for name in names if not os.path.splitext(name)[1] and name.lower() not in PROSE]
    return f"data: of {folder} files without a suffix are not read: {join_names(unread)}" if unread else ""


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


def _split_parts(pattern: str) -> list[str]:
    """Return the names of folders and of the file in a pattern."""
    return [part for part in pattern.split("/") if part not in ("", ".")]


def _matches(parts: list[str], path: str) -> bool:
    """Return whether a pattern matches a whole path, relative to the folder of the pattern."""
    return len(parts) in _find_matching_lengths(parts, path.split(os.sep))


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
