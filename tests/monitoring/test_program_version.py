"""The version and the commit of this program, as git says them."""

from __future__ import annotations

import subprocess

import pytest

from monitoring.program_version import find_program_version
from tests.helpers.programs import ROOT


def test_the_version_is_git_s():
    """The version is that of this repository, also where variables name another one."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True)
    if done.returncode:
        assert find_program_version() == {}
        return
    version = find_program_version()
    assert version["commit"] == done.stdout.strip() and version["fsdp-finetune"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_DIR", "/nonexistent")
        assert find_program_version() == version
        patch.setenv("PATH", "/nonexistent")
        assert find_program_version() == {}
