"""Rows of data sets of the Hugging Face hub and of local folders.

The `datasets` library finds, downloads and reads what is on the hub. Of a local folder it tells which files
belong to which split; they are read here, like a file that is named by itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]  # of datasets
import yaml
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from data.folder_files import check_links, files_below, files_matching
from data.row_files import Rows, read_file, restore_digits, without_fillers
from files.hub_errors import HUB_ERRORS
from options.data_files import KINDS, PROSE, kind_in_folder
from options.errors import UserError, join_names
from options.limits import MAX_FOLDER_ENTRIES

# Keys of a configuration in README.md that say which files, not how to read them.
NAMING_KEYS = {"config_name", "data_files", "data_dir", "default", "description"}
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")  # train-00000-of-00002.parquet
# What `datasets` raises for folders and files that hold no data set, beside errors of its own.
UNREADABLE = (*HUB_ERRORS, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
ANSWERS: tuple[type[Exception], ...] = (*HUB_ERRORS, HFValidationError)  # of the hub, or of one out of reach
WRITE_RECIPE = "write a recipe with data_files (docs/data.md)"
CHOOSE = f"name one file, or {WRITE_RECIPE}"


def read_hub(source: str, data_files: str, split: str, samples: int, root: str | None = None) -> Rows:
    """Read the rows of a hub id, or of a local folder, as `datasets` does.

    Args:
        data_files: a pattern for the files; "" = as the repository or folder says.
        split: the name of a split, or a part of one, such as train[:100].
        samples: at most so many rows, from the first; -1 = all.
        root: of a local folder: the folder of the recipe that names it, which no file may lie outside of.

    Raises UserError.
    """
    datasets, local = _library(source), os.path.isdir(source)
    if not local and not datasets.config.HF_HUB_OFFLINE and not _reachable(source):
        datasets.config.HF_HUB_OFFLINE = True  # its cache or nothing, without 20 seconds of retries
    with _told(source, "" if local else "; nor is there a file or folder of that name"):
        if root:
            _check_chosen(source, data_files, root)
        loaded = datasets.load_dataset(source, data_files=data_files or None, split=split)
    if 0 < samples < len(loaded):
        loaded = loaded.select(range(samples))
    rows = [without_fillers(row) for row in loaded.to_list()]
    restore_digits(rows, loaded.features.arrow_schema)
    alone = local or data_files or datasets.config.HF_HUB_OFFLINE
    remarks = (
        _unread_splits(source, split, loaded.info.splits or ()),
        "" if alone else _kinds_remark(source),
        _numbers_remark(source, loaded),
    )
    origins = [f"{source} row {i}" for i in range(1, len(loaded) + 1)]
    return Rows(rows, origins, tuple(filter(None, remarks)))


def _numbers_remark(source: str, loaded: Any) -> str:
    """Return a remark on columns of a text file in which `datasets` has seen numbers; "" if there are none."""
    if loaded.info.builder_name not in ("csv", "json"):
        return ""
    schema = loaded.features.arrow_schema
    numbers = [f.name for f in schema if re.match(r"u?int|float|double", str(f.type))]
    what = (
        f"data: of {source} `datasets` reads as numbers, as in 007 = 7 and 1.10 = 1.1: {join_names(numbers)}"
    )
    return what if numbers else ""


def _unread_splits(source: str, split: str, splits: Iterable[str]) -> str:
    """Return a remark on the splits of a data set beside the one that is read; "" if there are none."""
    others = [name for name in splits if not re.match(rf"{re.escape(name)}(\W|$)", split)]
    return f"data: of {source} the split {split} is read, not {join_names(others)}" if others else ""


def _check_chosen(folder: str, data_files: str, root: str) -> None:
    """Raise UserError if `datasets` would read a file outside of root, as the folder's README.md may say."""
    builder = _library(folder).load_dataset_builder(folder, data_files=data_files or None)
    for path in chain.from_iterable((builder.config.data_files or {}).values()):
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
            raise UserError(
                f"--dataset {folder}: its README.md names {path}, which is outside of the recipe's folder"
            )


def _kinds_remark(hub_id: str) -> str:
    """Return a remark if a repository has several kinds of data files and its README does not choose; else
    ''.

    `datasets` reads one kind. A hub repository is not the user's to clean up, so it is not refused.
    """
    from huggingface_hub import HfApi, hf_hub_download

    try:
        names = HfApi().list_repo_files(hub_id, repo_type="dataset")
        kinds = Counter(kind for name in names if (kind := kind_in_folder(name)))
        if len(kinds) < 2:
            return ""
        readme = hf_hub_download(hub_id, "README.md", repo_type="dataset") if "README.md" in names else ""
    except HUB_ERRORS:  # the rows were read: a remark is not worth an end
        return ""
    if readme and _configs(os.path.dirname(readme)):
        return ""
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    return f"data: {hub_id} has data files of several kinds ({counts}), of which one is read; {WRITE_RECIPE}"


def read_folder(folder: str, data_files: str, split: str, samples: int, root: str | None = None) -> Rows:
    """Read the rows of a local folder: of its files that belong to the split, or match the pattern
    data_files, in order of their names. The arguments are those of `read_hub`.

    Raises UserError for a folder of which only a part would be read: files of several kinds, or of no split;
    and with `root` for links that lead out of it. Where the folder's README.md says which files are meant,
    `datasets` reads those.
    """
    if root:
        check_links(folder, root)
    found = files_matching(folder, data_files) if data_files else files_below(folder)
    given = [path for path in found if kind_in_folder(path)]
    kinds = Counter(kind_in_folder(path) for path in given)
    if not data_files and (configs := _configs(folder)):
        return _read_configured(folder, configs, split, samples, root)
    if len(kinds) > 1:
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        raise UserError(f"--dataset {folder}: holds data files of several kinds ({counts}); {CHOOSE}")
    if not given or not set(kinds) <= set(KINDS.values()):
        return read_hub(folder, data_files, split, samples, root)
    splits = {"train": given} if data_files else _splits(folder, given)
    unread = sorted(set(given).difference(*splits.values()))
    if unread:
        first = os.path.relpath(unread[0], folder)
        raise UserError(
            f"--dataset {folder}: {len(unread)} of its {len(given)} data files, such as {first}, belong to"
            f" no split ({', '.join(splits)}) and would not be read; {CHOOSE}"
        )
    if not re.fullmatch(r"\w+", split):  # a part of a split, such as train[:100]
        return read_hub(folder, data_files, split, samples, root)
    if split not in splits:
        raise UserError(f"--dataset {folder}: has no split {split}, only {', '.join(splits)}; {CHOOSE}")
    if not data_files:
        _check_shards(folder, splits[split])
    remarks = _unread_splits(folder, split, splits), "" if data_files else _nameless_remark(folder, found)
    return replace(_joined(splits[split], samples), remarks=tuple(filter(None, remarks)))


def _check_shards(folder: str, paths: list[str]) -> None:
    """Raise UserError if names such as train-00000-of-00003.parquet tell that a file of the set is missing."""
    sets: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        if match := SHARD.fullmatch(path):
            before, number, of, after = match.groups()
            sets.setdefault((before, of, after), set()).add(int(number))
    for (before, of, after), numbers in sets.items():
        missing = sorted({*range(int(of))} - numbers) if int(of) <= MAX_FOLDER_ENTRIES else [0]
        if missing:
            name = os.path.relpath(f"{before}-{missing[0]:05d}-of-{of}{after}", folder)
            raise UserError(
                f"--dataset {folder}: {name} is missing: {len(numbers)} of {int(of)} files; {CHOOSE}"
            )


def _nameless_remark(folder: str, paths: list[str]) -> str:
    """Return a remark on files without a suffix, which may hold rows and are not read; "" if there are none."""
    names = [os.path.basename(path) for path in paths]
    nameless = [name for name in names if not os.path.splitext(name)[1] and name.lower() not in PROSE]
    return (
        f"data: of {folder} files without a suffix are not read: {join_names(nameless)}" if nameless else ""
    )


def _read_configured(folder: str, configs: list, split: str, samples: int, root: str | None) -> Rows:
    """Read the rows of a local folder whose README.md says which files are its data set.

    `datasets` chooses the files. They are read here, unless the README also says how to read them.
    """
    if root:
        _check_chosen(folder, "", root)
    with _told(folder):
        config = _library(folder).load_dataset_builder(folder).config
    chosen: dict = next((each for each in configs if each.get("config_name", "default") == config.name), {})
    files = config.data_files or {}
    paths = [str(path) for path in files.get(split, ())]
    kinds = {kind_in_folder(path) for path in paths}
    if not paths or not set(chosen) <= NAMING_KEYS or len(kinds) > 1 or not kinds <= set(KINDS.values()):
        return read_hub(folder, "", split, samples, root)
    unread = _unread_splits(folder, split, map(str, files))
    return replace(_joined(paths, samples), remarks=tuple(filter(None, [unread])))


def _joined(paths: list[str], samples: int) -> Rows:
    rows, origins = [], []
    for path in paths:
        read = read_file(Path(path))
        rows += read.rows
        origins += read.origins
        if 0 < samples <= len(rows):
            break
    return Rows(rows, origins)


def _splits(folder: str, given: list[str]) -> dict[str, list[str]]:
    """Return {split: those of the given files that belong to it}, told from the names of files and folders as
    `datasets` does: train.jsonl, test/a.jsonl, data/train-00000-of-00001.parquet; one split train where no
    name tells."""
    datasets = _library(folder)
    # The library goes by all files in a folder, so that train.py would be a split: it is shown the given ones
    # alone.
    memory, base = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    shown = {f"{base}/{os.path.relpath(path, folder)}": path for path in given}
    try:
        for name in shown:
            memory.pipe(name, b"-")
        with _told(folder):
            patterns = datasets.data_files.get_data_patterns(f"memory:/{base}")
            splits = {}
            for split, wanted in patterns.items():
                found: set[str] = set()
                for pattern in wanted:
                    with contextlib.suppress(FileNotFoundError):  # one of several spellings
                        found.update(datasets.data_files.resolve_pattern(pattern, f"memory:/{base}"))
                splits[str(split)] = sorted(shown[name.removeprefix("memory://")] for name in found)
    finally:
        memory.rm(base, recursive=True)
    return {split: paths for split, paths in splits.items() if paths}


def _configs(folder: str) -> list[dict]:
    """Return what `configs` of the YAML header of the folder's README.md, or of .huggingface.yaml, holds."""
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
        found = (yaml.safe_load(text) or {}).get("configs")
    except (yaml.YAMLError, AttributeError, RecursionError):
        found = [{"unreadable": True}] if "configs:" in text else None  # `datasets` says what is wrong
    found = found if isinstance(found, list) else [found] if found else []
    return [each if isinstance(each, dict) else {"unreadable": True} for each in found]


def _library(source: str) -> Any:
    import datasets

    if not hasattr(datasets, "load_dataset"):  # our folder datasets/, seen as an empty package
        raise UserError(f"--dataset {source}: needs the package `datasets` (pip install datasets)")
    datasets.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what it raises says it as well
    return datasets


@contextlib.contextmanager
def _told(source: str, more: str = "") -> Iterator[None]:
    """Errors of the library as UserErrors of one line, which `more` ends."""
    import datasets

    try:
        yield
    except (*UNREADABLE, datasets.exceptions.DatasetsError) as e:
        if isinstance(e, datasets.exceptions.DatasetGenerationError):  # says nothing itself
            e = e.__cause__ or e
        reason = " ".join(str(e).split()) or type(e).__name__  # often many lines, the first saying little
        raise UserError(f"--dataset {source}: could not be loaded ({reason[:300]}){more}") from None


def _reachable(hub_id: str) -> bool:
    """Whether the hub answers. What is wrong with the id, or with the connection, is then for load_dataset to
    say."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(hub_id, repo_type="dataset", allow_patterns=[".gitattributes"])
    except LocalEntryNotFoundError:
        return False
    except ANSWERS:
        pass
    return True
