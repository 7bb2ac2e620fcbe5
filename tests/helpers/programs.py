"""train.py as users start it, its processes, and the metrics of its runs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

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


def run_here(args, **env: str) -> tuple[int, str, str]:
    """Run train.py in this process; return (exit status, stdout, stderr), also of its ranks.

    The ranks are forks of the tests' server. `start` runs the program as users do, but imports its modules
    twice, which takes ten seconds.
    """
    import train
    from tests.helpers.distributed import start_fork_server

    start_fork_server()
    with (
        tempfile.NamedTemporaryFile("a+", buffering=1) as out,
        tempfile.NamedTemporaryFile("a+", buffering=1) as err,
        mock.patch.dict(os.environ, env),
        mock.patch.object(train, "run_rank", partial(_run_redirected_rank, out.name, err.name)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = train.main(list(map(str, args)))
        return status, Path(out.name).read_text(), Path(err.name).read_text()


def _run_redirected_rank(out: str, err: str, rank_info, job) -> None:
    """Run a rank of `run_here`, whose output goes to these files."""
    import train

    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    train.run_rank(rank_info, job)


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
