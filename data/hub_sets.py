"""Read the rows of data sets of the Hugging Face hub and of local folders.

The `datasets` library finds, downloads and reads data sets of the hub. For a local folder it only assigns
files to splits; the files are read here, like a file that is named by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec  # type: ignore[import-untyped]  # of datasets

from data.folder_files import (
    RECIPE_HINT,
    check_links,
    check_packed_twins,
    check_shards,
    describe_choices,
    describe_unread_names,
    glob_data_files,
    list_data_files,
    list_patterns,
    read_configs,
)
from data.hub_revisions import open_config, open_hub_set
from data.image_store import IMAGE_COLUMNS, ImageStore
from data.parquet_rows import drop_schema_nulls, restore_digits
from data.row_files import Rows, read_file
from data.schemas import join_columns
from files.hub_errors import HUB_ERRORS
from options.data_files import KINDS, kind_in_folder
from options.errors import UserError, join_names

# Keys of a configuration in README.md that say which files to read, not how.
NAMING_KEYS = {"config_name", "data_files", "data_dir", "default", "description"}
# Errors that `datasets` raises for folders and files that hold no data set, in addition to its own.
# ArithmeticError: a date that does not exist.
UNREADABLE = (*HUB_ERRORS, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError)


def read_hub(
    source: str,
    data_files: str,
    split: str,
    samples: int,
    root: str | None = None,
    config: str = "",
    revision: str = "",
    image_columns: Collection[str] = IMAGE_COLUMNS,
) -> Rows:
    """Read the rows of a hub id, or of a local folder, as `datasets` does.

    Args:
        source: the hub id or folder.
        data_files: a pattern for the files; "" = as the repository or folder says.
        split: the name of a split, or a part of one, such as train[:100].
        samples: maximum number of rows, from the first; -1 = all.
        root: for a local folder: the folder of the recipe that names it. All files must be inside it.
        config: the configuration; "" = the default one.
        revision: of a hub id: its branch, tag or commit; "" = the main branch.
        image_columns: the columns that hold images.

    Raises UserError for whatever `datasets` cannot load, and for files outside of root.
    """
    datasets, local, commit = _import_datasets(source), os.path.isdir(source), ""
    with _convert_library_errors(source, "" if local else "; nor is there a file or folder of that name"):
        if root:
            _check_files_inside(source, data_files, root, config)
        if local:
            builder = open_config(datasets, source, config, data_files=data_files or None)
        else:
            builder, commit = open_hub_set(datasets, source, config, data_files, revision)
        _check_split(source, split, builder.config.data_files or ())  # before a download
        builder.download_and_prepare()
        _check_split(source, split, builder.info.splits or ())
        loaded = builder.as_dataset(split=split)
        if 0 < samples < len(loaded):
            loaded = loaded.select(range(samples))
        rows = _store_images(loaded, source, image_columns)
    restore_digits(rows, loaded.features.arrow_schema)
    skip_repository = local or data_files or datasets.config.HF_HUB_OFFLINE
    remarks = (
        _unread_splits_remark(source, split, loaded.info.splits or ()),
        "" if skip_repository else _repository_remark(source, loaded.info.config_name or "", config, commit),
        _numbers_remark(source, loaded),
    )
    origins = [f"{source} row {i}" for i in range(1, len(loaded) + 1)]
    folders = [source if local else ""] * len(rows)
    return Rows(rows, origins, tuple(filter(None, remarks)), commit, folders)


def _store_images(loaded: Any, source: str, image_columns: Collection[str]) -> list[dict]:
    """Return the rows of a set that `datasets` loaded; the bytes of their images go to the cache.

    `to_list` decodes no image. A few rows at a time keep the images out of the memory.
    """
    with ImageStore(source) as store:
        blocks = (loaded.select(range(i, min(i + 64, len(loaded)))) for i in range(0, len(loaded), 64))
        return [
            store.take_row(drop_schema_nulls(row), image_columns)
            for block in blocks
            for row in block.to_list()
        ]


def _check_split(source: str, split: str, splits: Iterable[str]) -> None:
    """Raise UserError if a split is not among the names of a set's splits, of which there may be none yet.

    A part of a split, such as train[:100], is not checked.
    """
    names = [str(name) for name in splits]
    if names and re.fullmatch(r"\w+(\.\w+)*", split) and split not in names:
        raise UserError(f"--dataset {source}: has no split {split}, only {', '.join(names)}")


def _numbers_remark(source: str, loaded: Any) -> str:
    """Return a remark on columns of a text file that `datasets` reads as numbers; "" if there are none."""
    if loaded.info.builder_name not in ("csv", "json"):
        return ""
    schema = loaded.features.arrow_schema
    columns = [f.name for f in schema if re.match(r"u?int|float|double", str(f.type))]
    if not columns:
        return ""
    names = join_columns(columns)
    return (
        f"data: `datasets` reads these columns of {source} as numbers (007 becomes 7, 1.10 becomes 1.1):"
        f" {names}"
    )


def _unread_configs_remark(source: str, config: str, configs: list[dict]) -> str:
    """Return a remark on the configurations beside the one that is read; "" if there are none.

    config: name of the one that is read. configs: from `read_configs`.
    """
    names = (str(each.get("config_name", "default")) for each in configs)
    others = [name for name in names if name != config]
    if not others:
        return ""
    return f"data: only the configuration {config} of {source} is read, not {join_names(others)}"


def _unread_splits_remark(source: str, split: str, splits: Iterable[str]) -> str:
    """Return a remark on the splits of a data set that are not read; "" if there are none."""
    others = [name for name in splits if not re.match(rf"{re.escape(name)}(\W|$)", split)]
    return f"data: only the split {split} of {source} is read, not {join_names(others)}" if others else ""


def _check_files_inside(folder: str, data_files: str, root: str, config: str) -> None:
    """Raise UserError if `datasets` would read a file outside of root, as the folder's README.md may say.

    Call it within `_convert_library_errors`.
    """
    datasets = _import_datasets(folder)
    builder = open_config(datasets, folder, config, data_files=data_files or None)
    for path in chain.from_iterable((builder.config.data_files or {}).values()):
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
            raise UserError(
                f"--dataset {folder}: its README.md names {path}, which is outside of the recipe's folder"
            )


def _repository_remark(hub_id: str, config: str, chosen: str, commit: str) -> str:
    """Return a remark on the data of a repository that are not read; "" if there are none.

    They are other configurations than `config`, or, if its README.md has none, data files of other kinds:
    `datasets` reads one kind. Users cannot clean up a repository of the hub, so it is not refused.

    Args:
        hub_id: `owner/name`.
        config: the configuration that is read.
        chosen: the one that the user named, who knows the others then; "" = none.
        commit: of the set; "" = not known.
    """
    from huggingface_hub import HfApi, hf_hub_download

    try:
        names = HfApi().list_repo_files(hub_id, repo_type="dataset", revision=commit or None)
        kinds = Counter(kind for name in names if (kind := kind_in_folder(name)))
        readme = ""
        if "README.md" in names:
            readme = hf_hub_download(hub_id, "README.md", repo_type="dataset", revision=commit or None)
    except HUB_ERRORS:  # the rows were already read, so a missing remark does not matter
        return ""
    if readme and (configs := read_configs(os.path.dirname(readme))):
        return "" if chosen else _unread_configs_remark(hub_id, config, configs)
    if len(kinds) < 2:
        return ""
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    return f"data: {hub_id} has data files of several kinds ({counts}), of which one is read; {RECIPE_HINT}"


def read_folder(
    folder: str,
    data_files: str,
    split: str,
    samples: int,
    root: str | None = None,
    config: str = "",
    image_columns: Collection[str] = IMAGE_COLUMNS,
) -> Rows:
    """Read the files of a local folder that belong to the split, or match data_files, sorted by name.

    If the folder's README.md says which files are its data set, `datasets` chooses them.

    Args:
        folder: the folder.
        data_files: a pattern, relative to the folder; "" = the files of the split.
        split, samples: as for `read_hub`.
        root: the folder of the recipe that names `folder`; all files must be inside it. None = not checked.
        config: a configuration in the folder's README.md; "" = the default one.
        image_columns: the columns that hold images.

    Raises UserError for a folder of which only a part would be read, with files of several kinds or of no
    split, and for links that lead out of `root`.
    """
    if root:
        check_links(folder, root)
    paths = glob_data_files(folder, data_files) if data_files else list_data_files(folder)
    data_paths = [path for path in paths if kind_in_folder(path)]
    kinds = Counter(kind_in_folder(path) for path in data_paths)
    if data_files and not data_paths:
        raise UserError(f"--dataset {os.path.join(folder, data_files)}: matches no data file")
    if not data_files and (configs := read_configs(folder)):
        return _read_configured_folder(folder, configs, split, samples, root, config, image_columns)
    if config:
        raise UserError(f"--dataset {folder}: has no configuration {config}: its README.md names none")
    _check_kinds(folder, kinds, data_paths)
    check_packed_twins(folder, data_paths)
    if not data_paths or not set(kinds) <= set(KINDS.values()):
        return read_hub(folder, data_files, split, samples, root, image_columns=image_columns)
    splits = {"train": data_paths} if data_files else _find_splits(folder, data_paths)
    _check_all_have_a_split(folder, data_paths, splits)
    if not re.fullmatch(r"\w+", split):  # a part of a split, such as train[:100]
        check_shards(folder, data_paths, data_files or "**")
        return read_hub(folder, data_files, split, samples, root, image_columns=image_columns)
    if split not in splits:
        choices = describe_choices(folder, data_paths)
        raise UserError(f"--dataset {folder}: has no split {split}, only {', '.join(splits)}; {choices}")
    check_shards(folder, splits[split], data_files or "**")
    remarks = (
        _unread_splits_remark(folder, split, splits),
        "" if data_files else describe_unread_names(folder, paths),
    )
    return replace(_read_files(splits[split], samples, image_columns), remarks=tuple(filter(None, remarks)))


def _check_kinds(folder: str, kinds: Counter, data_paths: list[str]) -> None:
    """Raise UserError if data files are of several kinds. kinds: {kind: number of files}."""
    if len(kinds) > 1:
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        choices = describe_choices(folder, data_paths)
        raise UserError(f"--dataset {folder}: holds data files of several kinds ({counts}); {choices}")


def _check_all_have_a_split(folder: str, data_paths: list[str], splits: dict[str, list[str]]) -> None:
    """Raise UserError if some of a folder's data files belong to no split. splits: from `_find_splits`."""
    unread = sorted(set(data_paths).difference(*splits.values()))
    if unread:
        first = os.path.relpath(unread[0], folder)
        raise UserError(
            f"--dataset {folder}: {len(unread)} of its {len(data_paths)} data files, such as {first}, belong"
            f" to no split ({', '.join(splits)}) and would not be read;"
            f" {describe_choices(folder, data_paths)}"
        )


def _read_configured_folder(
    folder: str,
    configs: list,
    split: str,
    samples: int,
    root: str | None,
    config: str,
    image_columns: Collection[str],
) -> Rows:
    """Read the rows of a local folder whose README.md says which files are its data set.

    `datasets` chooses the files. They are read here, unless the README also says how to read them.
    Arguments as in `read_folder`; configs: from `read_configs`.
    """
    datasets = _import_datasets(folder)
    with _convert_library_errors(folder):
        if root:
            _check_files_inside(folder, "", root, config)
        opened = open_config(datasets, folder, config).config
    chosen: dict = next((each for each in configs if each.get("config_name", "default") == opened.name), {})
    files = opened.data_files or {}
    _check_split(folder, split, files)
    paths = [str(path) for path in files.get(split, ())]
    kinds = {kind_in_folder(path) for path in paths}
    if not paths or not set(chosen) <= NAMING_KEYS or len(kinds) > 1 or not kinds <= set(KINDS.values()):
        return read_hub(folder, "", split, samples, root, config, image_columns=image_columns)
    for pattern in list_patterns(chosen.get("data_files"), split):
        check_shards(folder, paths, pattern)
    remarks = (
        _unread_splits_remark(folder, split, map(str, files)),
        "" if config else _unread_configs_remark(folder, opened.name, configs),
    )
    return replace(_read_files(paths, samples, image_columns), remarks=tuple(filter(None, remarks)))


def _read_files(paths: list[str], samples: int, image_columns: Collection[str]) -> Rows:
    """Read files in order until they hold `samples` rows; return all rows of these files. -1 = all files."""
    rows, origins, folders = [], [], list[str]()
    for path in paths:
        file_rows = read_file(Path(path), image_columns)
        rows += file_rows.rows
        origins += file_rows.origins
        folders += file_rows.folders
        if 0 < samples <= len(rows):
            break
    return Rows(rows, origins, folders=folders)


def _find_splits(folder: str, data_paths: list[str]) -> dict[str, list[str]]:
    """Return {split: the paths that belong to it}.

    As in `datasets`, names of files and folders tell the split: train.jsonl, test/a.jsonl,
    data/train-00000-of-00001.parquet. If no name does, there is one split, train. Raises UserError.
    """
    datasets = _import_datasets(folder)
    # The library uses all files in a folder, so train.py would be a split. It gets only the data files, in
    # memory.
    memory, base = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    path_of_copy = {f"{base}/{os.path.relpath(path, folder)}": path for path in data_paths}
    try:
        for name in path_of_copy:
            memory.pipe(name, b"-")
        with _convert_library_errors(folder):
            patterns = datasets.data_files.get_data_patterns(f"memory:/{base}")
            splits = {}
            for split, split_patterns in patterns.items():
                found: set[str] = set()
                for pattern in split_patterns:
                    with contextlib.suppress(FileNotFoundError):  # one of several spellings
                        found.update(datasets.data_files.resolve_pattern(pattern, f"memory:/{base}"))
                splits[str(split)] = sorted(path_of_copy[name.removeprefix("memory://")] for name in found)
    finally:
        memory.rm(base, recursive=True)
    return {split: paths for split, paths in splits.items() if paths}


def _import_datasets(source: str) -> ModuleType:
    """Return the package `datasets`, with its output silenced in the process. Raises UserError without it.

    source: for the message.
    """
    with contextlib.suppress(ImportError):
        datasets = importlib.import_module("datasets")
        if hasattr(datasets, "load_dataset"):  # else it is our folder datasets/, as an empty package
            datasets.utils.logging.disable_progress_bar()
            datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # its errors say the same
            return datasets
    raise UserError(f"--dataset {source}: needs the package `datasets` (pip install datasets)")


@contextlib.contextmanager
def _convert_library_errors(source: str, line_end: str = "") -> Iterator[None]:
    """Within the context, turn the errors of `datasets` into UserErrors of one line, with `line_end` last.

    Raises UserError without that package.
    """
    datasets = _import_datasets(source)
    try:
        yield
    except (*UNREADABLE, datasets.exceptions.DatasetsError) as e:
        if isinstance(e, datasets.exceptions.DatasetGenerationError):  # says nothing itself
            e = e.__cause__ or e
        reason = " ".join(str(e).split()) or type(e).__name__  # often many lines, the first saying little
        raise UserError(f"--dataset {source}: could not be loaded ({reason[:300]}){line_end}") from None
