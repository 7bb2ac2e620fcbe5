"""Repositories as huggingface_hub lays them out on a disk after a download."""

from __future__ import annotations

import shutil
from pathlib import Path

FIRST, SECOND = "1" * 40, "2" * 40  # commits


def publish(cache: Path, name: str, model: Path, commit: str, *refs: str) -> Path:
    """Puts a model into the cache as a commit of the repository `owner/name`, to which branches and tags, `refs`, lead from
    now on. Returns the commit's snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    for ref in refs:
        (repository / "refs" / ref).write_text(commit)
    return shutil.copytree(model, repository / "snapshots" / commit)
