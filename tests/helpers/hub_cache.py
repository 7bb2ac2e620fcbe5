"""The Hugging Face hub: downloaded repositories in its cache, and a broken connection."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

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
