"""Programs of benchmarks.memory side by side: started where GPUs have room, sampled, and turned into rows."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.make_checkpoint import EMPTY
from benchmarks.memory_rows import OUT_OF_MEMORY, RAN, Row, append_row, describe, measured_figures
from benchmarks.memory_settings import ROWS_OF_ALPACA, Options, Setting
from benchmarks.process_memory import HostMemory, list_process_tree, read_host_memory
from benchmarks.run import ROOT, find_error_line
from benchmarks.sparse_models import write_sparse_copy
from launch.memory import GIB
from monitoring.memory_model import MemoryEstimate
from options.train import parse as parse_training

PROGRAM = "benchmarks.measured_run"
STEPS = 3  # the first makes the optimizer's states
ALL_GIB = 10_000.0  # a limit above any GPU
SPARE_GIB = 3.0  # GPU memory beside torch's tensors: CUDA's context, kernels, NCCL
SECONDS_TO_START = 25  # with less time left, no program is started
PAUSE_SECONDS = 0.25
COMPILE_THREADS = "4"  # of each program; torch's default starts 32 processes


@dataclass(frozen=True)
class Task:
    """A run to make.

    Attributes:
        setting: its options.
        model: its checkpoint.
        predicted: what it should take; None without a GPU.
        factor: its limit relative to the predicted peak; None = no limit.
    """

    setting: Setting
    model: Path
    predicted: MemoryEstimate | None
    factor: float | None = None

    @property
    def name(self) -> str:
        return self.setting.name if self.factor is None else f"{self.setting.name} x{self.factor}"

    @property
    def limit_gib(self) -> float | None:
        """GiB per GPU that torch may take; None = all."""
        if self.factor is None or self.predicted is None:
            return None
        return self.factor * self.predicted.peak / GIB

    @property
    def room_gib(self) -> float:
        """GiB of each GPU to keep free for it, with an allowance for a wrong prediction."""
        return (1.1 * self.predicted.peak / GIB if self.predicted else 0.0) + SPARE_GIB


@dataclass
class Running:
    """A program that runs.

    Attributes:
        devices: its GPUs.
        folder: its files: the output (log), the RUN (run), and what the ranks write.
        samples: its host memory from time to time, and the bytes that its ranks have page-locked then.
    """

    task: Task
    process: subprocess.Popen
    devices: list[str]
    folder: Path
    began: float
    samples: list[tuple[HostMemory, int]] = field(default_factory=list)

    def sample(self) -> None:
        """Read the memory of its processes, and what its ranks have page-locked."""
        memory = read_host_memory(list_process_tree(self.process.pid))
        locked = 0
        for path in self.folder.glob("page_locked*[0-9]"):
            with contextlib.suppress(OSError, ValueError):  # it is being replaced
                locked += int(path.read_text())
        self.samples.append((memory, locked))

    def kill(self) -> None:
        """End the program with all processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def train_options(setting: Setting, model: Path, out: Path) -> list[str]:
    """Return the command line of train.py. out: where its RUN goes, and rows of Alpaca's lengths lie."""
    config, _ = parse_training(["--model_name", str(model), *setting.options.split()])
    samples = 2 * STEPS * config.batch_size * setting.gpus
    dataset = "dummy"
    if setting.dataset == ROWS_OF_ALPACA:
        # A pack of 8,192 tokens has some 60 of these rows.
        dataset, samples = str(out.parent / "alpaca.jsonl"), 100 * samples
    return [
        *f"--model_name {model} --dataset {dataset} --dataset_samples {samples}".split(),
        *f"--world_size {setting.gpus} --output_dir {out / 'run'} --max_steps {STEPS}".split(),
        *"--save_model false --log_to stdout".split(),
        *setting.options.split(),
    ]


class Benchmark:
    """Runs tasks side by side and writes their rows.

    Args:
        options: of the command line.
        devices: the GPUs' names for CUDA_VISIBLE_DEVICES; [] = runs on the CPU, as many as --parallel.
        gpu_gib: memory of each GPU.
    """

    def __init__(self, options: Options, devices: list[str], gpu_gib: float):
        self.options, self.devices, self.gpu_gib = options, devices, gpu_gib
        self.running: list[Running] = []
        self.deadline = time.monotonic() + options.time_limit

    def run(self, tasks: list[Task]) -> None:
        """Run the tasks, until all have ended or the time limit is over."""
        # What needs several GPUs, or much memory, finds room at the beginning only.
        pending = sorted(tasks, key=lambda task: (-task.setting.gpus, -task.room_gib))
        while pending or self.running:
            left = self.deadline - time.monotonic()
            if left < 0 or (not self.running and left < SECONDS_TO_START):
                self._stop(pending)
                return
            if left >= SECONDS_TO_START:
                self._start_what_fits(pending)
            self._reap()
            time.sleep(PAUSE_SECONDS)

    def _stop(self, pending: list[Task]) -> None:
        """End what runs, without rows, and print the names of all that is missing."""
        for each in self.running:
            each.kill()
        names = [each.task.name for each in self.running] + [task.name for task in pending]
        print(f"--time_limit {self.options.time_limit}: not run: {', '.join(names)}", flush=True)
        self.running = []

    def _start_what_fits(self, pending: list[Task]) -> None:
        """Start the tasks for which GPUs have room, and take them off the list."""
        for task in list(pending):
            devices = self._find_devices(task)
            if devices is not None:
                pending.remove(task)
                self.running.append(self._start(task, devices))

    def _find_devices(self, task: Task) -> list[str] | None:
        """Return the GPUs that have room for a task, [] for one on the CPU; None if it has to wait."""
        if not self.devices:
            return [] if len(self.running) < self.options.parallel else None
        beside = {d: [r.task.room_gib for r in self.running if d in r.devices] for d in self.devices}
        # A task that would not fit an empty GPU is tried alone.
        free = [
            device
            for device, rooms in beside.items()
            if not rooms
            or (len(rooms) < self.options.parallel and sum(rooms) + task.room_gib <= self.gpu_gib)
        ]
        free.sort(key=lambda device: sum(beside[device]))
        return free[: task.setting.gpus] if len(free) >= task.setting.gpus else None

    def _start(self, task: Task, devices: list[str]) -> Running:
        """Start the program of a task in a new folder; it gets a copy of its own of an empty checkpoint."""
        folder = self.options.out.absolute() / task.name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model = task.model
        if (model / EMPTY).exists():
            model = folder / "model"
            write_sparse_copy(task.model, model)
        limit = str(task.limit_gib or ALL_GIB)
        argv = train_options(task.setting, model, folder)
        command = [sys.executable, "-m", PROGRAM, str(folder), limit, *argv]
        env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": COMPILE_THREADS}
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return Running(task, process, devices, folder, time.monotonic())

    def _reap(self) -> None:
        """Sample what runs; write the row of each program that has ended, or took too long."""
        for each in list(self.running):
            each.sample()
            seconds = time.monotonic() - each.began
            status = each.process.poll()
            if status is None and seconds < self.options.run_limit:
                continue
            each.kill()
            self.running.remove(each)
            row = make_row(each, status, seconds)
            append_row(self.options.out / "rows.jsonl", row)
            print(describe(row), flush=True)
            shutil.rmtree(each.folder / "model", ignore_errors=True)


def make_row(ended: Running, status: int | None, seconds: float) -> Row:
    """Return the row of a program that has ended. status: its exit status; None if it took too long."""
    task, text = ended.task, (ended.folder / "log").read_text(errors="replace")
    outcome = RAN
    if status is None:
        outcome = f"took longer than {seconds:.0f} s"
    elif status:
        outcome = OUT_OF_MEMORY if "CUDA out of memory" in text else find_error_line(text, status)
    ranks = [json.loads(path.read_text()) for path in sorted(ended.folder.glob("rank*.json"))]
    predicted, measured, details = {}, {}, {}
    if outcome == RAN:
        predicted, measured = measured_figures(ended.folder / "run", ranks)
    if ranks and ended.samples:
        counted = all(rank["counts_page_locked"] for rank in ranks)
        host = max(memory.total + (0 if counted else locked) for memory, locked in ended.samples)
        if any(memory.own for memory, _ in ended.samples):  # some containers have no smaps_rollup
            measured["host"] = host / GIB
        details = {
            "counts_page_locked": counted,
            "page_locked": max(locked for _, locked in ended.samples) / GIB,
            "files": max(memory.files for memory, _ in ended.samples) / GIB,
            "reserved": max(rank["reserved"] for rank in ranks) / GIB,
        }
    return Row(
        name=task.name,
        options=task.setting.options,
        gpus=task.setting.gpus,
        limit_gib=task.limit_gib,
        factor=task.factor,
        outcome=outcome,
        seconds=round(seconds, 1),
        predicted=predicted,
        measured=measured,
        details=details,
    )
