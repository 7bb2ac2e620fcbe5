"""Find the commit of a hub data set that a revision means, and open exactly this commit.

`datasets` reads the newest set in its cache where it cannot reach the hub or does not find the revision. Here
another commit than the one asked for is an error, because a run records the commit to be repeatable.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError

from files.hub_errors import HUB_ERRORS
from options.errors import UserError, join_names
from options.limits import MAX_CONFIG_BYTES, read_json

COMMIT = re.compile(r"[0-9a-f]{40}")
# Errors of a request to the hub, whether it answers or not.
REQUEST_ERRORS: tuple[type[Exception], ...] = (*HUB_ERRORS, HFValidationError)


def find_commit(hub_id: str, revision: str, offline: bool) -> tuple[str, bool]:
    """Return (the commit of a revision or "" if it is unknown, whether the hub answers, be it with an error).

    Args:
        hub_id: `owner/name` of a data set.
        revision: a branch, tag or commit; "" = the main branch.
        offline: ask only the hub's cache, which knows the revisions that were asked for before.

    Raises UserError if the repository has no such revision.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        if not offline:
            HfApi().dataset_info(hub_id, revision=revision or None, timeout=10)
    except RevisionNotFoundError:
        raise UserError(
            f"--dataset {hub_id}@{revision}: on the hub {hub_id} has no branch, tag or commit {revision}"
        ) from None
    except (HfHubHTTPError, HFValidationError):  # opening the set reports it
        return "", True
    except HUB_ERRORS:  # no connection
        offline = True
    try:
        snapshot = snapshot_download(  # also records in the hub's cache which commit the revision is
            hub_id,
            repo_type="dataset",
            revision=revision or None,
            allow_patterns=[".gitattributes"],
            local_files_only=offline,
        )
    except REQUEST_ERRORS:
        return revision if COMMIT.fullmatch(revision) else "", not offline
    return os.path.basename(snapshot), not offline


def open_hub_set(
    datasets: ModuleType, hub_id: str, config: str, data_files: str, revision: str
) -> tuple[Any, str]:
    """Return (a builder of `datasets` for a set of the hub, its commit or "" if that is not known).

    Args:
        datasets: the package.
        hub_id: `owner/name`.
        config: the configuration; "" = the default one.
        data_files: a pattern for the files; "" = as the repository says.
        revision: a branch, tag or commit; "" = the main branch.

    Raises UserError for a revision or configuration that is not there, and whatever `datasets` raises.
    """
    commit, is_online = find_commit(hub_id, revision, datasets.config.HF_HUB_OFFLINE)
    datasets.config.HF_HUB_OFFLINE = not is_online  # uses the cache without 20 seconds of retries
    if is_online:
        arguments = {"data_files": data_files or None, "revision": commit or revision or None}
        builder = open_config(datasets, hub_id, config, **arguments)
        if not isinstance(builder, _cache_class()):  # else `datasets` fell back to what its cache holds
            return builder, commit
    lacking = f"--dataset {hub_id}@{revision}: the hub cannot be reached, and"
    if revision and not commit:
        raise UserError(f"{lacking} its cache does not know this revision")
    found = _find_cached(datasets, hub_id, config, data_files, commit) if commit else None
    if found:
        arguments = {"repo_id": hub_id, "dataset_name": hub_id.split("/")[-1], "hash": commit}
        version = found.parent.name
        return _cache_class()(config_name=found.parts[-3], version=version, **arguments), commit
    if revision:
        raise UserError(
            f"{lacking} the cache of `datasets` lacks {data_files or 'the rows'} of this revision"
        )
    builder = datasets.load_dataset_builder(hub_id, config or None, data_files=data_files or None)
    return builder, builder.hash if COMMIT.fullmatch(builder.hash or "") else ""


def open_config(datasets: ModuleType, source: str, config: str, **arguments: Any) -> Any:
    """Return a builder of `datasets` for a configuration. Raises UserError, with all names, if there is none.

    Args:
        datasets: the package.
        source: a hub id or a folder.
        config: the configuration; "" = the default one.
        arguments: more arguments of `load_dataset_builder`: data_files and revision.
    """
    try:
        return datasets.load_dataset_builder(source, config or None, **arguments)
    except ValueError:
        names = datasets.get_dataset_config_names(source, **arguments)
        check_config(source, config, names)
        raise


def check_config(source: str, config: str, names: list[str], where: str = "") -> None:
    """Raise UserError if a configuration is not among those of a set, or if none is chosen of several.

    Args:
        source: the hub id or folder.
        config: the chosen configuration; "" = none.
        names: all configurations.
        where: where they were looked for, if not in all of the set, to go into the error.
    """
    if config and config not in names:
        raise UserError(f"--dataset {source}: {where}has no configuration {config}, only {join_names(names)}")
    if not config and len(names) > 1:
        raise UserError(
            f"--dataset {source}: {where}has several configurations, none of which is the default; name one,"
            f" as in {source}:{names[0]}: {join_names(names)}"
        )


def _cache_class() -> type:
    """Return the builder of `datasets` that reads its own cache."""
    from datasets.packaged_modules.cache.cache import Cache

    return Cache


def _find_cached(datasets: ModuleType, hub_id: str, config: str, data_files: str, commit: str) -> Path | None:
    """Return the folder of a configuration of a commit in the cache of `datasets`; None if none is there.

    Arguments as in `open_hub_set`. Raises UserError if the cache has other configurations of the commit only.
    """
    *owner, name = hub_id.split("/")
    repository = "___".join([*owner, datasets.naming.camelcase_to_snakecase(name)])
    root = os.path.join(os.path.expanduser(str(datasets.config.HF_DATASETS_CACHE)), repository)
    paths = map(Path, glob.glob(os.path.join(glob.escape(root), "*", "*", commit)))
    folders = {path.parts[-3]: path for path in sorted(paths) if path.is_dir()}
    if data_files:  # the folder's name has a digest of them
        kwargs = {"data_files": data_files}
        return folders.get(datasets.BuilderConfig(config or "default").create_config_id(kwargs))
    folders = {name: path for name, path in folders.items() if _is_whole_config(path)}
    if not folders:
        return None
    config = config or ("default" if "default" in folders else "")
    check_config(hub_id, config, [*folders], "without the hub, in the cache of `datasets`, ")
    return folders[config or next(iter(folders))]


def _is_whole_config(folder: Path) -> bool:
    """Return whether a folder in the cache of `datasets` has all of a configuration, not some files of it."""
    info = read_json(folder / "dataset_info.json", MAX_CONFIG_BYTES)
    return info.get("config_name") == folder.parts[-3]
