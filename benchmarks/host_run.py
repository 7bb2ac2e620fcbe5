"""Run train.py for benchmarks.host: layers are recorded as CUDA graphs late, so that a run shows both.

    RECORD_AFTER=20 SHARDED=1 python -m benchmarks.host_run --world_size 1 --cuda_graphs true ...

RECORD_AFTER: calls of a layer before it is recorded. SHARDED: with FSDP's units and collectives on a single
GPU, too, which otherwise needs none: it then shows what a host does for a step of several GPUs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from unittest import mock

import train
from launch.ranks import RankInfo
from training.job import Job

RECORD_AFTER, SHARDED = "RECORD_AFTER", "SHARDED"  # environment variables
_run_rank = train.run_rank


def run_late(rank_info: RankInfo, job: Job) -> None:
    """Run a rank of train.py as the environment variables say."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("parallel.layer_graphs.CALLS_BEFORE", int(os.environ[RECORD_AFTER])))
        if SHARDED in os.environ:
            stack.enter_context(mock.patch("wrapping.needs_units", lambda *_: True))
        _run_rank(rank_info, job)


if __name__ == "__main__":
    train.run_rank = run_late
    sys.exit(train.main(sys.argv[1:]))
