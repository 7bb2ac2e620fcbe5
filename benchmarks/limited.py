"""Run train.py as if each GPU had less memory, and on models that are larger than the disk.

    python -m benchmarks.make_checkpoint /tmp/70b 70b empty
    python -m benchmarks.limited 24 --model_name /tmp/70b --dataset dummy --train_type bnb_dora ...

The first number is GiB per GPU; without GPUs it limits nothing. The files of an `empty` checkpoint are
sparse: each tensor is written into its file just before train.py reads it, and its disk blocks are freed
afterwards. Linux only.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import zlib
from functools import cache
from pathlib import Path

import torch

import train
from benchmarks.make_checkpoint import EMPTY, STD
from files import model_folder as model_files
from files.tensors import PinnedBuffers, StoredTensor, StreamedTensor, read_tensor
from launch.ranks import RankInfo
from training.job import Job
from training.trial import Trial

_run_rank, _try_rank = train.run_rank, train.try_rank
GIB = "LIMITED_TO_GIB"  # environment variable that passes the limit to the ranks
PUNCH_HOLE = 0x02 | 0x01  # fallocate(2): free the blocks, keep the size


@cache
def _sample_bytes() -> memoryview:
    """Return 128 MiB of random bf16 weights, as bytes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(2**26, dtype=torch.bfloat16).normal_(0, STD, generator=generator)
    return memoryview(values.view(torch.uint8).numpy())


def _fill_tensor(descriptor: int, stored: StoredTensor) -> None:
    """Write values for a tensor into its open file: ones for a norm, otherwise a part of the sample.

    The sample's start depends on the tensor's offset, so that tensors differ.
    """
    remaining, offset = 2 * math.prod(stored.shape), stored.begin
    if len(stored.shape) == 1:
        os.pwrite(
            descriptor, torch.ones(stored.shape, dtype=torch.bfloat16).view(torch.uint8).numpy(), offset
        )
        return
    begin = 2 * (zlib.crc32(f"{stored.file}:{stored.begin}".encode()) % 2**25)
    while remaining:
        written = os.pwrite(descriptor, _sample_bytes()[begin : begin + remaining], offset)
        remaining, offset, begin = remaining - written, offset + written, 0


def read_filled(
    folder: Path, stored: StoredTensor, buffers: PinnedBuffers | None = None
) -> torch.Tensor | StreamedTensor:
    """Call `read_tensor`; in an empty checkpoint fill the tensor first and free its blocks afterwards.

    Raises OSError. An empty checkpoint's tensor is read at once and not staged, since its blocks are freed.
    """
    if not (folder / EMPTY).exists():
        return read_tensor(folder, stored, buffers)
    file = os.open(folder / stored.file, os.O_RDWR)
    try:
        _fill_tensor(file, stored)
        tensor = read_tensor(folder, stored)
        libc = ctypes.CDLL(None, use_errno=True)
        extent = ctypes.c_long(stored.begin), ctypes.c_long(tensor.nbytes)
        if libc.fallocate(file, PUNCH_HOLE, *extent):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder / stored.file))
        return tensor
    finally:
        os.close(file)


def limit(rank_info: RankInfo) -> None:
    """Let this rank have LIMITED_TO_GIB of its GPU's memory, and read weights by `read_filled`."""
    model_files.read_tensor = read_filled
    if rank_info.device.type == "cuda":
        total = torch.cuda.get_device_properties(rank_info.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(float(os.environ[GIB]) * 2**30 / total, 1.0))


def run_limited(rank_info: RankInfo, job: Job) -> None:
    """Run a rank of train.py within the limit."""
    limit(rank_info)
    _run_rank(rank_info, job)


def try_limited(rank_info: RankInfo, trial: Trial, folder: str) -> None:
    """Run a rank of a trial, as --batch_size auto makes them, within the limit."""
    limit(rank_info)
    _try_rank(rank_info, trial, folder)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    os.environ[GIB] = sys.argv[1]
    train.run_rank, train.try_rank = run_limited, try_limited
    sys.exit(train.main(sys.argv[2:]))
