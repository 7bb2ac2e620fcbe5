"""docs/slurm.sbatch with Slurm's programs replaced: what srun gets, and what happens at the time limit."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from monitoring.messages import describe_stop
from options.train import parse
from tests.helpers.programs import ROOT, metrics, small

SCRIPT = ROOT / "docs" / "slurm.sbatch"
WAIT_SECONDS = 60
# Each records its arguments. srun runs until scancel has been called, or runs the command.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > srun.txt
if [[ ! -e real ]]; then
  touch started
  until [[ -e scancel.txt || -e finish ]]; do sleep 0.05; done
  [[ -e last_line ]] && cat last_line
  exit "$(cat status 2>/dev/null || echo 0)"
fi
while [[ $1 == --* ]]; do shift; done
cd "$ROOT" && exec "$@"
"""
SCANCEL = """#!/bin/bash
echo "$@" > scancel.txt
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && echo 127.0.0.1 || echo "$@" > requeue.txt
"""


@pytest.fixture
def submit(tmp_path):
    """submit(*options of train.py) starts the script as Slurm does; its programs write into tmp_path."""
    started = []
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def start(*options: str) -> subprocess.Popen:
        environment = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2",
                       "SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "7", "ROOT": str(ROOT),
                       "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                       "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
        job = subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, options)], cwd=tmp_path, env=os.environ | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(job)
        return job

    yield start
    for job in started:
        for process in [*psutil.Process(job.pid).children(recursive=True), job] if job.poll() is None else ():
            process.kill()


def wait_for(path: Path) -> str:
    """Return the text of a file as soon as it is there."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.read_text()


def test_srun_gets_the_cpus_and_train_its_options(submit, tmp_path):
    job = submit("--train_type", "qlora", "--name", "two words")
    wait_for(tmp_path / "started")
    (tmp_path / "finish").touch()
    assert job.communicate(timeout=WAIT_SECONDS)[0] == "" and job.returncode == 0
    got = (tmp_path / "srun.txt").read_text().splitlines()
    assert got[:2] == ["--cpus-per-task=7", "--kill-on-bad-exit=1"]
    assert got[-7:] == ["train.py", "--log_to", "stdout", "--train_type", "qlora", "--name", "two words"]
    assert "--nproc_per_node=2" in got and not (tmp_path / "requeue.txt").exists()
    parse(got[-6:])


@pytest.mark.parametrize(
    ("options", "status", "stopped", "requeued"),
    [
        (["--output_dir", "run", "--resume", "auto"], 0, True, True),
        (["--resume=auto"], 0, True, True),
        (["--output_dir", "run"], 0, True, False),  # it would start again, or be refused
        (["--resume", "auto"], 1, True, False),  # the run failed
        (["--resume", "auto"], 0, False, False),  # it ended by itself: to resume it is an error
    ],
)
def test_at_the_time_limit_the_ranks_stop_and_the_job_is_requeued(
    submit, tmp_path, options, status, stopped, requeued
):
    (tmp_path / "status").write_text(str(status))
    line = describe_stop("SIGTERM", [SimpleNamespace(step=3)], 9, Path("run")) if stopped else "complete"
    (tmp_path / "last_line").write_text(f"{line}\n")
    job = submit(*options)
    wait_for(tmp_path / "started")
    job.send_signal(signal.SIGUSR2)  # --signal=B:USR2@300
    printed = job.communicate(timeout=WAIT_SECONDS)[0]
    assert wait_for(tmp_path / "scancel.txt") == f"--signal=TERM {os.getpid()}\n"
    assert job.returncode == status
    assert (tmp_path / "requeue.txt").exists() == requeued
    assert ("goes back into the queue" in printed) == requeued
    assert ("--resume auto continues" in printed) == (status == 0 and stopped and not requeued)
    assert ("the run ended by itself" in printed) == (status == 0 and not stopped)
    assert printed.startswith(f"{line}\n")


@pytest.mark.slow
def test_a_run_that_is_out_of_time_saves_and_continues(submit, tmp_path, checkpoints, alpaca_file):
    """SIGTERM to all processes of the step, as scancel sends it: torchrun ends with the ranks' status, 0."""
    (tmp_path / "real").touch()
    out = tmp_path / "out"
    options = [*small(checkpoints, alpaca_file, out), "--max_steps", "2000", "--num_epochs", "2000"]
    options += ["--resume", "auto"]
    job = submit(*options)
    wait_for(out / "metrics.jsonl")
    while not metrics(out):
        time.sleep(0.1)
    step = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGUSR2)
    wait_for(tmp_path / "scancel.txt")
    for process in step:
        process.send_signal(signal.SIGTERM)
    printed = job.communicate(timeout=WAIT_SECONDS)[0]
    assert job.returncode == 0, printed
    assert (tmp_path / "requeue.txt").read_text() == f"requeue {os.getpid()}\n"
    done = len(metrics(out))
    assert sorted(out.glob("checkpoints/step-*"))[-1].name == f"step-{done:08}"
    options[options.index("2000")] = str(done + 1)
    again = submit(*options)
    assert again.communicate(timeout=WAIT_SECONDS)[0] and again.returncode == 0
    assert [m["step"] for m in metrics(out)] == [*range(1, done + 2)]


def test_the_script_is_valid_and_its_commands_name_options():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).returncode == 0
    pages = [(ROOT / "docs" / "nodes.md").read_text("utf-8"), SCRIPT.read_text("utf-8")]
    commands = re.findall(r"docs/slurm.sbatch (--.*)$", "\n".join(pages).replace("\\\n", " "), re.MULTILINE)
    assert len(commands) >= 3
    for line in commands:
        parse(shlex.split(line.replace("...", "toy")))
