"""Runs of the program inside the pool's ranks, stopped by signals, and what they leave to compare."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

import train
from command_line import parse
from tests.runs import whole_run
from tracking import Meter

RUN = (  # an epoch has 10 steps; of half the rows, packed, 5 at most
    "--train_type bnb_dora --lora_rank 6 --lr 1e-2 --lr_scheduler cosine --batch_size 1 --num_epochs 2"
    " --context_length 256 --log_to stdout --gradient_accumulation_steps 2"
).split()
NOISY = [
    *RUN,
    *"--lora_dropout 0.1 --precision fp16_autocast --packing --deterministic --max_steps 8 --dataset_samples 20".split(),
]
QUIET = [*RUN, "--max_steps", "7"]
REPEATED = ("step", "epoch", "lr", "tokens", "trained_tokens", "loss", "grad_norm", "eval_loss")


def run(place, argv: list[str], before=None) -> str:
    """A rank's part of a run of the program; returns what it printed. before(place, step): called in each step."""
    config, _ = parse([*argv, "--world_size", str(place.world)])
    measure = Meter.measure

    def measured(self, index, *rest):
        if before:
            before(place, index)
        return measure(self, index, *rest)

    Meter.measure = measured
    try:
        return whole_run(place, train.check(config))
    finally:
        Meter.measure = measure
        torch.use_deterministic_algorithms(False)


class Signals:
    """{step: signal that the last rank gets in it}."""

    def __init__(self, at: dict[int, int]):
        self.at = at

    def __call__(self, place, step: int) -> None:
        if place.rank == place.world - 1 and step in self.at:
            signal.raise_signal(self.at[step])


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def repeated(folder: Path) -> list[dict]:
    return [{name: line.get(name) for name in REPEATED} for line in lines(folder)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")
