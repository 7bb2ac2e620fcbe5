"""A run that was stopped goes on as the run that was not: the same losses and weights."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from command_line import parse
from tests.runs import whole_run
from tracking import Meter

STEPS = 12  # an epoch has 10
RUN = (
    "--train_type bnb_dora --lora_rank 4 --lora_dropout 0.1 --lr 1e-2 --lr_scheduler cosine --batch_size 1"
    " --gradient_accumulation_steps 2 --num_epochs 2 --max_steps 12 --context_length 256 --precision fp16_autocast --log_to stdout"
).split()
SAME = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "eval_loss")


def run(place, argv: list[str], signals: dict[int, int]) -> str:
    """A rank's part of a run of the program; returns what it printed. signals: {step: signal that rank 0 gets in
    it}."""
    config, _ = parse([*argv, "--world_size", str(place.world)])
    measure = Meter.measure

    def measured(self, index, *rest):
        if place.rank == 0 and index in signals:
            signal.raise_signal(signals[index])
        return measure(self, index, *rest)

    Meter.measure = measured
    try:
        return whole_run(place, train.check(config))
    finally:
        Meter.measure = measure


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(folder: Path) -> list[dict]:
    """What must repeat of each step."""
    return [{name: line.get(name) for name in SAME} for line in lines(folder)]


@pytest.fixture(scope="module")
def argv(checkpoints, alpaca_file):
    return ["--model_name", str(checkpoints()), "--dataset", str(alpaca_file), *RUN]


@pytest.fixture(scope="module")
def undisturbed(argv, two_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    two_ranks(run, [*argv, "--output_dir", str(folder)], {})
    return folder


def test_a_stopped_run_goes_on_to_the_last_bit(argv, undisturbed, two_ranks, tmp_path):
    folder = tmp_path / "run"
    again = [*argv, "--output_dir", str(folder), "--resume", "auto"]
    printed = two_ranks(run, again, {3: signal.SIGTERM})[0]
    assert "stopped at step 3 of 12 (SIGTERM)" in printed
    assert not (folder / "adapter_model.safetensors").exists()
    print(printed)
    print(two_ranks(run, again, {11: signal.SIGINT})[0])
    print(two_ranks(run, again, {})[0])
    assert trained(folder) == trained(undisturbed)
    theirs, ours = (load_file(f / "adapter_model.safetensors") for f in (undisturbed, folder))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
