"""A stand-in for train.py: the files, signals and exit statuses of a run, without its training.

`python -m tests.helpers.fake_training sweep ARGUMENTS` runs sweep.py with it. Each run takes FAKE_STEPS steps
of FAKE_SECONDS seconds, and evaluates after every second one. Its loss depends on --lr: 1e-3 is the best.
With FAKE_MISSING the check before a sweep finds that this file is missing.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

from options.config import Config
from options.train import parse

COMMAND = [sys.executable, "-m", "tests.helpers.fake_training"]


def evaluation_loss(lr: float, step: int) -> float:
    return 1 + (math.log10(lr) + 3) ** 2 + 1 / step


def run(config: Config) -> int:
    folder, total = Path(config.output_dir), int(os.environ.get("FAKE_STEPS", "6"))
    if config.show_rows:
        if missing := os.environ.get("FAKE_MISSING"):
            print(f"error: --dataset {missing}: no such file", file=sys.stderr)
        return 2 if missing else 0
    if config.lora_rank == 13:
        print("some line\nerror: --lora_rank 13: is unlucky", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoints" / "step-00000001"
    assert config.resume == "auto" if checkpoint.exists() else config.overwrite
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    print(f"start at {done} of {os.getpid()}", flush=True)
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
    (folder / "run.json").write_text(json.dumps({"data": {"steps_per_epoch": total}}))
    lines = (folder / "metrics.jsonl").read_text().splitlines(True)[:done] if done else []
    (folder / "metrics.jsonl").write_text("".join(lines))
    for step in range(done + 1, total + 1):
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        line = {"step": step, "loss": 2.0, "epoch": step / total}
        if step % 2 == 0:
            fold = int((config.eval_fold or "0/2").split("/")[0])
            line["eval_loss"] = evaluation_loss(config.lr, step) + fold
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if stops and step < total:
            checkpoint.parent.mkdir(exist_ok=True)
            checkpoint.write_text(str(step))
            print("stopped", flush=True)
            return 0
    print("ended", flush=True)
    return 0


def run_sweep(argv: list[str]) -> int:
    """Run sweep.py in this process, with the stand-in."""
    import sweep  # takes seconds, which each run would wait for
    from training import sweep_pool, sweep_trial

    with (
        patch.object(sweep_trial, "PROGRAM", COMMAND),
        patch.object(sweep_trial, "POLL_SECONDS", 0.05),
        patch.object(sweep, "WAIT_SECONDS", 0.05),
        patch.object(sweep_pool, "WAKE_SECONDS", 0.05),
    ):
        return sweep.main(argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["sweep"]:
        sys.exit(run_sweep(sys.argv[2:]))
    sys.exit(run(parse(sys.argv[1:])[0]))
