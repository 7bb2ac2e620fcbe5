"""Runs of the program inside the pool's ranks, stopped by signals, and what they leave to compare."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import train
from checkpoints import adapter as adapter_files
from checkpoints import storage as checkpoint_files
from checkpoints import trained_model
from checkpoints.storage import folder_of
from files import disk_room
from files.names import BEST
from monitoring.metrics import Meter
from options.train import parse
from tests.helpers.manifests import edit
from tests.helpers.runs import whole_run

RUN = (  # an epoch has 10 steps; of half the rows, packed, 5 at most
    "--train_type bnb_dora --lora_rank 6 --lr 1e-2 --lr_scheduler cosine --batch_size 1 --num_epochs 2"
    " --context_length 256 --log_to stdout --gradient_accumulation_steps 2 --deterministic --compile false"
    " --lora_target_modules q_proj,down_proj"
).split()
NOISY = [
    *RUN,
    *"--lora_dropout 0.1 --precision fp16_autocast --packing --context_length 80 --max_steps 5 --dataset_samples 12".split(),
]
QUIET = [*RUN, "--max_steps", "7"]
CHECK_ROOM = disk_room.check_room
REPEATED = ("step", "epoch", "lr", "tokens", "trained_tokens", "loss", "grad_norm", "eval_loss")


def run(rank_info, argv: list[str], before=None) -> str:
    """A rank's part of a run of the program; returns what it printed. before(place, step): called in each step."""
    config, _ = parse([*argv, "--world_size", str(rank_info.world)])
    read = Meter.read

    def reads(self, index, *rest):
        if before:
            before(rank_info, index)
        return read(self, index, *rest)

    Meter.read = reads
    try:
        return whole_run(rank_info, train.check(config))
    finally:
        Meter.read = read
        torch.use_deterministic_algorithms(False)


class Signals:
    """{step: signal that the last rank gets in it}."""

    def __init__(self, at: dict[int, int]):
        self.at = at

    def __call__(self, rank_info, step: int) -> None:
        if rank_info.rank == rank_info.world - 1 and step in self.at:
            signal.raise_signal(self.at[step])


def fill(disk: Path, leave: int = 0) -> None:
    with contextlib.suppress(OSError), (disk / "others").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(disk / "others", (disk / "others").stat().st_size - leave)


def check_room_by(check: Callable[[Path, int], None]) -> None:
    for module in (adapter_files, checkpoint_files, trained_model):
        module.check_room = check


class Filling:
    """Others fill the disk while the step `fills` runs, and leave it in the step `leaves`. checked: whether the room is
    looked at before anything large is written; unless it is, the disk is full in the middle of that. seen: what best/ holds
    in those two steps."""

    def __init__(self, disk: Path, fills: int, leaves: int, checked: bool):
        self.disk, self.fills, self.leaves, self.checked = disk, fills, leaves, checked
        self.seen: list[dict[str, bytes]] = []

    def __call__(self, rank_info, step: int) -> None:
        if rank_info.rank:
            return
        if step in (self.fills, self.leaves):
            self.seen.append(contents(self.disk / "run" / BEST))
        checks = self.checked or not self.fills <= step < self.leaves
        check_room_by(CHECK_ROOM if checks else lambda *_: None)
        if step == self.fills:
            fill(self.disk, leave=16 * 1024)
        if step == self.leaves:
            (self.disk / "others").unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def repeated(folder: Path) -> list[dict]:
    return [{name: line.get(name) for name in REPEATED} for line in lines(folder)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def resumed(source, folder: Path, *more: str):
    """The checked job of going on with a copy of `stopped`, in the 2 ranks that it had."""
    config, _ = parse(
        [*source, *QUIET, "--output_dir", str(folder), "--world_size", "2", "--resume", "auto", *more]
    )
    return train.check(config)


def lie(folder: Path, change) -> None:
    """In the manifest of the copy's checkpoint, which is whole all the same."""
    edit(folder_of(folder, 3), change)
