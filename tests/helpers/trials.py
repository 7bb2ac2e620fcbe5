"""Ranks of trials that end as those on a full machine do, without filling it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch

import train
from launch.ranks import RankInfo
from options.errors import UserError
from training.trial import Trial
from training.trial_rank import record_trial

MOST_TOKENS = "TESTS_MOST_TOKENS"  # environment variable: tokens of a micro-batch that "fit"


def run_in_pool(rank_info: RankInfo, trial: Trial, folder: Path) -> dict:
    """Run a trial's rank in a test's pool of ranks; return the record that it wrote."""
    train.try_rank(rank_info, trial, str(folder))
    return json.loads((folder / f"{rank_info.rank}.json").read_text())


def try_with_limit(rank_info: RankInfo, trial: Trial, folder: str) -> None:
    """Be out of memory, as a GPU is, on rank 0 alone, beyond MOST_TOKENS; else succeed without a model."""
    with record_trial(trial, rank_info, folder) as (job, _, _):
        too_many = job.config.batch_size * trial.tokens > int(os.environ[MOST_TOKENS])
        if rank_info.rank == 0 and too_many:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        torch.distributed.barrier()


def main_with_limit(argv: list[str]) -> int:
    """Run train.py in this process, whose trials are those of `try_with_limit`. argv: MOST_TOKENS first."""
    os.environ[MOST_TOKENS] = argv[0]  # not inherited: a fork server started this process
    train.try_rank = try_with_limit
    return train.main(argv[1:])


def be_killed(rank_info: RankInfo, trial: Trial, folder: str) -> None:
    """End as a process does that the system kills when the host is out of memory; rank 1 waits for it."""
    if rank_info.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def never_end(rank_info: RankInfo, trial: Trial, folder: str) -> None:
    """Wait for a signal."""
    signal.pause()


def be_refused(rank_info: RankInfo, trial: Trial, folder: str) -> None:
    """Fail with an error that the user can fix."""
    with record_trial(trial, rank_info, folder):
        raise UserError("no such thing")


def be_wrong(rank_info: RankInfo, trial: Trial, folder: str) -> None:
    """Fail with an error of the program's."""
    with record_trial(trial, rank_info, folder):
        raise RuntimeError("a defect")
