"""benchmarks.light_ranks: two nodes of torchrun with two light ranks each; a lost rank and a lost node."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.programs import ROOT


def run_light_ranks(*options: str) -> list[dict]:
    """Return the rows of a run on nodes of two ranks."""
    words = ["-m", "benchmarks.light_ranks", "--ranks_per_node", "2", "--tokens", "1000", *options]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow  # a whole run under a launcher
def test_four_ranks_start_and_report(tmp_path):
    (row,) = run_light_ranks("--nodes", "2", "--out", str(tmp_path / "rows.jsonl"))
    assert (row["nodes"], row["ranks"], row["attempt"]) == (2, 4, 0)
    assert set(row["seconds"]) >= {"meet", "agree", "join", "mesh", "checkpoint group", "polls"}
    assert 0 < row["poll_seconds"] < row["start_seconds"] and row["open_files"] > 4
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == row


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["rank", "node"])
def test_all_ranks_start_again_after_a_loss(lost):
    """A lost node is replaced: torchrun notices after its keep-alive of 15 s."""
    (row,) = run_light_ranks("--nodes", "3", "--lose", lost)
    assert (row["ranks"], row["lost"]) == (6, lost) and row["attempt"] >= 1
    assert row["restart_seconds"] > 0 and "start_seconds" not in row
