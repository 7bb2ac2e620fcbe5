"""Run train.py as on Tesla T4s, on newer GPUs: their memory, dtypes and kernels, but not their speed.

    python -m benchmarks.make_checkpoint /tmp/8b 8b
    python -m benchmarks.turing --model_name /tmp/8b --dataset dummy --train_type bnb_dora ...

Each rank gets 15 GiB of its GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from benchmarks.limited import GIB, run_limited
from launch.devices import triton_runs_on
from launch.ranks import RankInfo
from models.attention import takes_grouped_heads
from training.job import Job

TRITON_KERNELS = "quantization.nf4_kernel", "quantization.hqq_kernel", "models.gather_kernel"
MEMORY_GIB = 15


@contextlib.contextmanager
def as_turing_gpu() -> Iterator[None]:
    """Let this process's GPUs be as Turing's (T4): no bf16, no Triton, only memory-efficient attention.

    The math kernel of PyTorch's attention, which any GPU has, is forbidden: it holds the scores of all
    tokens. An operation that needs it, or a Triton kernel, raises an error. Without GPUs nothing changes.
    """
    if not torch.cuda.is_available():
        yield
        return
    faked = {"get_device_capability": (7, 5), "is_bf16_supported": False}
    with contextlib.ExitStack() as stack:
        for name, result in faked.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=result))
        stack.enter_context(mock.patch.dict(sys.modules, dict.fromkeys(TRITON_KERNELS)))
        stack.enter_context(sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION))
        for cached in (triton_runs_on, takes_grouped_heads):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield


def run_as_turing(rank_info: RankInfo, job: Job) -> None:
    """Run a rank of train.py on a GPU that looks like a T4."""
    with as_turing_gpu():
        run_limited(rank_info, job)


if __name__ == "__main__":
    os.environ[GIB] = str(MEMORY_GIB)
    train.run_rank = run_as_turing
    with as_turing_gpu():
        sys.exit(train.main(sys.argv[1:]))
