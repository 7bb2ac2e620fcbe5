"""CONTRIBUTING.md: the files that it names exist, and the hooks do what it says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from tests.helpers.programs import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_files_and_folders_that_the_page_names_exist():
    named = re.findall(r"(?<![\w<])(?:[\w.]+/)*(?:[\w.]+/|[\w-]+\.(?:py|md))(?![\w<])", PAGE)
    assert len(named) > 40
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_links_lead_to_headings():
    for file, anchor in re.findall(r"\]\(([^)#]+)#([^)]+)\)", PAGE):
        headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, anchor


def test_the_table_has_all_packages():
    listed = re.findall(r"^\| (\w+)/ \|", PAGE, re.MULTILINE)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks", "tools"}
    assert len(listed) == len(packages) and set(listed) == packages


def test_pre_commit_runs_the_ruff_of_constraints():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (rev,) = [repo["rev"] for repo in repos if repo["repo"].endswith("/ruff-pre-commit")]
    assert f"ruff=={rev.removeprefix('v')}" in (ROOT / "constraints.txt").read_text("utf-8").splitlines()


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (f"{'é' * 72}\n\n{'x' * 90}\n", 0),
        (f"{'é' * 73}\n", 1),
        (f"\n# a comment of git's, of any length {'-' * 60}\n{'x' * 73}\n", 1),
        (f"short\n# {'-' * 90}\n", 0),
    ],
)
def test_the_hook_refuses_long_subjects(message, status, tmp_path):
    (tmp_path / "message").write_text(message, encoding="utf-8")
    command = [sys.executable, ROOT / "tools" / "check_commit_subject.py", tmp_path / "message"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status and ("at most 72" in done.stderr) == bool(status)
