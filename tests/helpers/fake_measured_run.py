"""Stands in for benchmarks.measured_run: takes no memory, and writes the files of a run that took PEAK_GIB.

It sleeps FAKE_SECONDS first.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

PREDICTED, PEAK_GIB = 2.0, 2.05


def main(folder: Path, limit: float) -> int:
    """Write the files; return the exit status, 2 if the limit is below the peak."""
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    (folder / "run").mkdir()
    phases = {"predicted_peak_gib": PREDICTED, "predicted_host_gib": 0.01, "after_load_gib": 1.0}
    (folder / "run" / "run.json").write_text(json.dumps({"memory": phases}))
    step = {"memory_after_forward_gib": 1.5, "memory_after_backward_gib": 1.25}
    steps = [step | {"memory_allocated_gib": gib} for gib in (1.9, PEAK_GIB)]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in steps))
    rank = {"counts_page_locked": False, "reserved": 2**31, "phases": {"optimizer": 2**30}}
    (folder / "rank0.json").write_text(json.dumps(rank))
    (folder / "page_locked0").write_text(str(2**30))
    time.sleep(1.0)  # so that it is sampled, on a busy machine too
    if limit < float(os.environ.get("FAKE_PEAK", "0")):
        print("error: rank 0: CUDA out of memory in the phase: backward")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
