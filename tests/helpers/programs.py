"""train.py as users start it, its processes, and the metrics of its runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def start(args, *launcher: str, **env: str) -> subprocess.Popen:
    """Start train.py, under a launcher (`-m torch.distributed.run ...`) if given."""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env
    )


def run(args, *launcher: str, **env: str) -> str:
    """Run train.py, which must succeed; return its output."""
    process = start(args, *launcher, **env)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, f"{out}\n{err}"
    return out + err


def run_and_read(args: list, out: Path, *launcher: str) -> list[dict]:
    """Run train.py into the folder `out`; return the lines of metrics.jsonl."""
    command = [sys.executable, *launcher, "train.py", *map(str, args), "--output_dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def small(checkpoints, rows, out, *more) -> list:
    """Return the arguments of a run of 4 steps."""
    options = ["--max_steps", "4", "--batch_size", "2", "--lora_rank", "8", "--lr", "2e-3", *more]
    return ["--model_name", checkpoints(), "--dataset", rows, "--output_dir", out, *options]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [m["loss"] for m in metrics(folder)]


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the rank processes in order: spawned by multiprocessing, or its fork server's children."""
    forked = [rank for server in started_by("forkserver", process) for rank in server.children()]
    return sorted(started_by("spawn_main", process) + forked, key=lambda c: c.create_time())


def started_by(method: str, process: subprocess.Popen) -> list[psutil.Process]:
    """Return the children with `method` in their command line: "spawn_main" or "forkserver"."""
    return [c for c in psutil.Process(process.pid).children() if method in " ".join(c.cmdline())]


def wait_for(condition, process: subprocess.Popen, seconds: float = 90):
    """Wait until condition() is true and return its value."""
    deadline = time.time() + seconds
    while time.time() < deadline and process.poll() is None:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited in vain: {process.communicate()}")


def wait_for_steps(process: subprocess.Popen, path: Path) -> None:
    wait_for(lambda: path.exists() and path.read_text().count("\n") >= 2, process)
