"""The Hugging Face hub: downloaded repositories in its cache, and a broken connection."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import datasets
from datasets.naming import camelcase_to_snakecase
from huggingface_hub.errors import HfHubHTTPError

FIRST, SECOND = "1" * 40, "2" * 40  # commits


def add_to_hub_cache(cache: Path, name: str, model: Path, commit: str, *refs: str) -> Path:
    """Add a model to the cache as a commit of a repository; return the commit's snapshot folder.

    Args:
        cache: the hub's cache.
        name: the repository, `owner/name`.
        model: the folder to copy.
        commit: the commit's hash.
        refs: branches and tags that point to the commit from now on.
    """
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    for ref in refs:
        (repository / "refs" / ref).write_text(commit)
    return shutil.copytree(model, repository / "snapshots" / commit)


def raise_connection_error(*_, **__):
    """Raise the error of the hub's HTTP client, httpx or httpx2, without a connection, in place of a call."""
    client = HfHubHTTPError.__bases__[0].__module__.partition(".")[0]
    raise sys.modules[client].ConnectError("gone")


def add_set_to_hub_cache(cache: Path, name: str, folder: Path, commit: str, *refs: str) -> None:
    """Add all configurations of a local folder to the caches as a commit of a data set, as if it were loaded.

    Args:
        cache: the cache of `datasets`; the hub's cache is its folder hub.
        name: the repository, `owner/name`; the folder must have the same name.
        folder: the files, with a README.md of configurations.
        commit: the commit's hash.
        refs: branches and tags that point to the commit from now on.
    """
    repository = cache / "hub" / f"datasets--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "snapshots" / commit).mkdir(parents=True)
    for ref in refs:
        (repository / "refs" / ref).write_text(commit)
    for config in datasets.get_dataset_config_names(str(folder)):
        builder = datasets.load_dataset_builder(str(folder), config, cache_dir=str(cache / "local"))
        owner, _, base = name.partition("/")  # MedPix is kept as med_pix
        kept = f"{owner}___{camelcase_to_snakecase(base)}"
        target = cache / kept / config / str(builder.config.version) / commit
        builder.download_and_prepare(str(target))
