"""The version of this program, from the git repository that it lies in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PROGRAM = "fsdp-finetune"
GIT_SECONDS = 10  # after which a slow disk's repository counts as none


def find_program_version() -> dict[str, str]:
    """Return {"fsdp-finetune": version, "commit": hash}; {} without git or outside of a repository.

    The version is that of `git describe`: the newest tag and the commits since, or the abbreviated commit,
    with -dirty if a file was changed. Remotes, whose addresses may hold tokens, are not read.
    """
    folder = Path(__file__).resolve().parents[1]
    version = _ask_git(folder, "describe", "--tags", "--always", "--dirty")
    commit = _ask_git(folder, "rev-parse", "HEAD")
    return {PROGRAM: version, "commit": commit} if version and commit else {}


def _ask_git(folder: Path, *command: str) -> str:
    """Return what a git command prints in a folder that is a repository's top; "" if it fails."""
    # A repository around the folder is not this program's, nor is one that variables name.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CEILING_DIRECTORIES": str(folder.parent), "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_SECONDS,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()
