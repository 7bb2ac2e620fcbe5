"""Runs that are killed, and go on."""

from __future__ import annotations

import psutil
import pytest

from tests.programs import start, wait_for
from tests.resuming import RUN, repeated, run
from tools.crash_test import crash_test


def test_kills_at_random_moments_change_nothing(tmp_path):
    """The short form of `python -m tools.crash_test`."""
    assert crash_test(tmp_path, kills=8, seed=1).startswith("8 kills, ")


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(checkpoints, alpaca_file, two_ranks, tmp_path):
    """A killed rank, and no help: torchrun ends the others and starts all anew, and they go on."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    argv = ["--model_name", str(checkpoints()), "--dataset", str(alpaca_file), *RUN]
    two_ranks(run, [*argv, "--output_dir", str(whole)])
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 --max-restarts 1".split()
    process = start([*argv, "--output_dir", out, "--save_every", "1", "--overwrite"], *launcher)
    wait_for(lambda: list(out.glob("checkpoints/step-????????/manifest.json")), process)
    psutil.Process(process.pid).children()[1].kill()
    shown, err = process.communicate(timeout=200)
    assert process.returncode == 0, shown + err
    assert "20 steps, the last" in shown, "it went on, and did not begin anew"
    assert repeated(out) == repeated(whole)
