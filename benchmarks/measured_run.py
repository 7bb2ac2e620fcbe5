"""Run train.py as benchmarks.limited does; each rank writes what it measures of its memory.

    python -m benchmarks.measured_run FOLDER GIB --model_name ... [any option of train.py]

GIB is the limit of memory per GPU. In FOLDER, rank<N>.json has the peaks when the run has ended, and
page_locked<N> the page-locked bytes of the rank while it runs, for benchmarks.memory, which adds them up.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch

import train
from benchmarks.limited import GIB, run_limited
from benchmarks.process_memory import read_host_memory
from files.atomic_writes import write_text
from launch.memory import PEAK_MEMORY, release_page_locked
from launch.ranks import RankInfo
from training.job import Job

FOLDER = "MEASURED_IN"  # environment variable that passes the folder to the ranks
PROBE_BYTES = 2**26
INTERVAL_SECONDS = 0.2


def counts_page_locked() -> bool:
    """Return whether the kernel counts this process's page-locked memory (`HostMemory.own`).

    That depends on the driver. The memory of the trial is given back.
    """
    before = read_host_memory([os.getpid()]).own
    held = torch.zeros(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    grown = read_host_memory([os.getpid()]).own - before
    del held
    release_page_locked()
    return grown > PROBE_BYTES / 2


class PageLockedReport:
    """A thread that writes how many page-locked bytes torch holds, free blocks in its cache included.

    torch asks the driver for powers of two, and these count. A context manager.
    """

    def __init__(self, path: Path):
        self.path, self.stopped = path, threading.Event()
        self.thread = threading.Thread(target=self._write, daemon=True)

    def _write(self) -> None:
        while not self.stopped.wait(INTERVAL_SECONDS):
            write_text(self.path, str(torch.cuda.host_memory_stats()["allocated_bytes.current"]))

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self.thread.join()


def run_measured(rank_info: RankInfo, job: Job) -> None:
    """Run a rank of train.py with a limit, and write its measurements when it ends, also if it fails."""
    folder, rank = Path(os.environ[FOLDER]), rank_info.rank
    found = {"counts_page_locked": True, "page_locked": 0, "reserved": 0}
    on_gpu = rank_info.device.type == "cuda"
    if on_gpu:
        found["counts_page_locked"] = counts_page_locked()
    try:
        if on_gpu:
            with PageLockedReport(folder / f"page_locked{rank}"):
                run_limited(rank_info, job)
        else:
            run_limited(rank_info, job)
    finally:
        if on_gpu:
            found["page_locked"] = torch.cuda.host_memory_stats()["allocated_bytes.peak"]
            found["reserved"] = torch.cuda.memory_stats()["reserved_bytes.all.peak"]
        write_text(folder / f"rank{rank}.json", json.dumps(found | {"phases": PEAK_MEMORY.by_phase}))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    os.environ[FOLDER], os.environ[GIB] = sys.argv[1:3]
    train.run_rank = run_measured
    sys.exit(train.main(sys.argv[3:]))
