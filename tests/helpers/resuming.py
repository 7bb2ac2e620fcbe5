"""Runs of the program in the pool's ranks, stopped by signals, and comparisons of their files."""

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
from checkpoints.storage import checkpoint_folder
from files import disk_room
from files.names import BEST
from monitoring.metrics import Meter
from options.train import parse
from tests.helpers.manifests import edit_manifest
from tests.helpers.runs import full_run

RUN = (  # an epoch has 10 steps; half of the rows, packed, make at most 5
    "--train_type bnb_dora --lora_rank 6 --lr 1e-2 --lr_scheduler cosine --batch_size 1 --num_epochs 2"
    " --context_length 256 --log_to stdout --gradient_accumulation_steps 2 --deterministic --compile false"
    " --lora_target_modules q_proj,down_proj"
).split()
NOISY = [
    *RUN,
    *"--lora_dropout 0.1 --precision fp16_autocast --packing --context_length 80 --max_steps 5".split(),
    *"--dataset_samples 12 --lora_plus_ratio 4".split(),
]
QUIET = [*RUN, "--max_steps", "7"]
CHECK_FREE_SPACE = disk_room.check_free_space
REPEATED = ("step", "epoch", "lr", "tokens", "trained_tokens", "loss", "grad_norm", "eval_loss")


def run(rank_info, argv: list[str], before=None) -> str:
    """Run the program on this rank; return its output. before(rank_info, step) is called in each step."""
    config, _ = parse([*argv, "--world_size", str(rank_info.world)])
    original = Meter.read

    def read(self, index, *rest):
        if before:
            before(rank_info, index)
        return original(self, index, *rest)

    Meter.read = read
    try:
        return full_run(rank_info, train.check_run(config))
    finally:
        Meter.read = original
        torch.use_deterministic_algorithms(False)


class Signals:
    """Raises signals on the last rank. at: {step: signal}."""

    def __init__(self, at: dict[int, int]):
        self.at = at

    def __call__(self, rank_info, step: int) -> None:
        if rank_info.rank == rank_info.world - 1 and step in self.at:
            signal.raise_signal(self.at[step])


def fill(disk: Path, leave: int = 0) -> None:
    """Fill a disk with the file `others`, up to `leave` bytes."""
    with contextlib.suppress(OSError), (disk / "others").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(disk / "others", (disk / "others").stat().st_size - leave)


def replace_free_space_check(check: Callable[[Path, int], None]) -> None:
    """Replace `check_free_space` in all modules that write checkpoints and results."""
    for module in (adapter_files, checkpoint_files, trained_model):
        module.check_free_space = check


class DiskFiller:
    """Fills the disk in one step of a run, and frees it in a later one.

    Attributes:
        disk: the folder where the disk is mounted; the RUN is its folder `run`. fill_step: the step in which
        the disk is filled. free_step: the step in which it is freed. checked: whether free space is checked
        before large writes. If not, the disk is full in the middle of one. seen: contents of best/ in the two
        steps.
    """

    def __init__(self, disk: Path, fill_step: int, free_step: int, checked: bool):
        self.disk, self.fill_step, self.free_step, self.checked = disk, fill_step, free_step, checked
        self.seen: list[dict[str, bytes]] = []

    def __call__(self, rank_info, step: int) -> None:
        if rank_info.rank:
            return
        if step in (self.fill_step, self.free_step):
            self.seen.append(contents(self.disk / "run" / BEST))
        checks = self.checked or not self.fill_step <= step < self.free_step
        replace_free_space_check(CHECK_FREE_SPACE if checks else lambda *_: None)
        if step == self.fill_step:
            fill(self.disk, leave=16 * 1024)
        if step == self.free_step:
            (self.disk / "others").unlink()


def contents(folder: Path) -> dict[str, bytes]:
    """Return {path: bytes} of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lines(folder: Path) -> list[dict]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def repeatable_metrics(folder: Path) -> list[dict]:
    """Return the values of metrics.jsonl that a resumed run must repeat exactly."""
    return [{name: line.get(name) for name in REPEATED} for line in lines(folder)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def check_resumed_job(source, folder: Path, *more: str):
    """Check the options to resume a copy of the run `stopped` in its 2 ranks; return the job."""
    config, _ = parse(
        [*source, *QUIET, "--output_dir", str(folder), "--world_size", "2", "--resume", "auto", *more]
    )
    return train.check_run(config)


def edit_copied_manifest(folder: Path, change) -> None:
    """Change the manifest of a copied run's checkpoint of step 3, with a valid checksum."""
    edit_manifest(checkpoint_folder(folder, 3), change)
