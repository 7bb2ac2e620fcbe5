"""Runs that are killed and resume."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.programs import start, wait_for
from tests.helpers.resuming import RUN, repeatable_metrics, run
from tools import crash_test as crash_test_module
from tools.crash_test import Attempt, crash_test


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(kills, source, tmp_path, monkeypatch):
    """A short `python -m tools.crash_test` on a smaller model."""
    smaller = [*source, "--lora_target_modules", "q_proj,down_proj", "--sample_every", "100"]
    monkeypatch.setattr(crash_test_module, "OPTIONS", [*crash_test_module.OPTIONS, *smaller])
    assert crash_test(tmp_path, kills, seed=1).startswith(f"{kills} kills, ")


def steps(folder: Path, number: int, pauses: float) -> None:
    """Replace a rank: write a line every 0.1 seconds, `number` of them, then pause."""
    for _ in range(number):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("{}\n")
        time.sleep(0.1)
    time.sleep(pauses)


@pytest.mark.parametrize("pauses", [0, 60])
def test_patience_is_for_a_step_and_not_for_the_run(pauses, tmp_path, monkeypatch):
    """The undisturbed run may take long on a slow machine; a run that hangs is ended."""
    monkeypatch.setattr(crash_test_module, "TIMEOUT_SECONDS", 1)
    attempt = Attempt.__new__(Attempt)
    attempt.folder, attempt.log = tmp_path, tmp_path / "log"
    attempt.log.write_text("")
    attempt.ranks = [multiprocessing.get_context("fork").Process(target=steps, args=(tmp_path, 12, pauses))]
    attempt.ranks[0].start()
    with pytest.raises(RuntimeError, match="the run failed") if pauses else contextlib.nullcontext():
        attempt.finish()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 12
    assert not attempt.ranks[0].is_alive()


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(checkpoints, alpaca_file, two_ranks, tmp_path):
    """One rank is killed: torchrun ends the others and starts all again, and they resume."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    argv = ["--model_name", str(checkpoints()), "--dataset", str(alpaca_file), *RUN]
    two_ranks(run, [*argv, "--output_dir", str(whole)])
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 --max-restarts 1".split()
    process = start([*argv, "--output_dir", out, "--save_every", "1", "--overwrite"], *launcher)
    wait_for(lambda: list(out.glob("checkpoints/step-????????/manifest.json")), process)
    psutil.Process(process.pid).children()[1].kill()
    shown, err = process.communicate(timeout=200)
    assert process.returncode == 0, shown + err
    assert "20 steps, the last" in shown, "it must resume, not start anew"
    assert repeatable_metrics(out) == repeatable_metrics(whole)
