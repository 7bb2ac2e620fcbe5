"""The Hugging Face hub: repositories as they lie on a disk after a download, and a connection that breaks off."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError

FIRST, SECOND = "1" * 40, "2" * 40  # commits


def publish(cache: Path, name: str, model: Path, commit: str, *refs: str) -> Path:
    """Puts a model into the cache as a commit of the repository `owner/name`, to which branches and tags, `refs`, lead from
    now on. Returns the commit's snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    for ref in refs:
        (repository / "refs" / ref).write_text(commit)
    return shutil.copytree(model, repository / "snapshots" / commit)


def broken_off(*_, **__):
    """In the place of a call of the hub: raise what its HTTP client, httpx or httpx2, raises without a connection."""
    client = HfHubHTTPError.__bases__[0].__module__.partition(".")[0]
    raise sys.modules[client].ConnectError("gone")
