"""The current process as the only rank of a run in fp32 on the CPU."""

from __future__ import annotations

import torch

from launch.precision import choose_precision
from launch.ranks import RankInfo

SINGLE_RANK = RankInfo(0, 1, 0, 1, torch.device("cpu"))
PLAIN = choose_precision("fp32", False, False)


def context():
    return PLAIN.context("cpu")
