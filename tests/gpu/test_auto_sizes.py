"""--batch_size auto on a GPU with little memory: benchmarks/limited.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from tests.helpers import tiny
from tests.helpers.programs import ROOT, losses

GIB = "1.5"


def train_limited(folder, out, *options) -> subprocess.CompletedProcess:
    """Run train.py with GIB of GPU memory, on rows of 1,024 tokens.

    Two runs of a command are equal only with --deterministic: attention's backward adds in any order.
    """
    argv = ["--model_name", folder, "--dataset", "dummy", "--context_length", "1024", "--world_size", "1"]
    argv += [
        "--max_steps",
        "2",
        "--compile",
        "false",
        "--deterministic",
        "true",
        "--output_dir",
        out,
        *options,
    ]
    command = [sys.executable, "-m", "benchmarks.limited", GIB, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.gpu
@pytest.mark.slow
def test_the_batch_is_within_one_of_the_largest_that_runs(tmp_path):
    """Losses are those of a run given that number."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "max_position_embeddings": 1024}
    folder = tiny.save_checkpoint("llama", tmp_path / "model", **sizes)
    auto = train_limited(folder, tmp_path / "auto", "--batch_size", "auto")
    assert auto.returncode == 0, auto.stderr
    batch = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["batch_size"]
    assert 1 < batch < 500, auto.stdout
    given = train_limited(folder, tmp_path / "given", "--batch_size", batch)
    assert given.returncode == 0 and losses(tmp_path / "auto") == losses(tmp_path / "given")
    larger = train_limited(folder, tmp_path / "larger", "--batch_size", batch + max(2, batch // 50 + 1))
    assert larger.returncode == 2 and "out of memory" in larger.stderr
