"""Measure this program and every installed peer, one after the other, on the same machine and work.

    python -m benchmarks.run                                            the 8B shape on one GPU
    python -m benchmarks.run --gpus 1,2 --train_types qlora,bnb_dora --precision auto,bf16
    python -m benchmarks.run --shape tiny --context_length 256         a rehearsal on a CPU

Makes a checkpoint of the shape with random weights, once. Writes into --out: results.md (a table for
docs/benchmarks.md), results.json, speed_memory.png, each run's output, and the RUN folders of ours.

All systems train on rows that fill the context. A peer that is not installed, lacks a feature, fails or takes
too long gets a row that says so. --pythons names the interpreters of peers that need an environment of their
own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.options import Options, parse
from benchmarks.systems import OURS, SYSTEMS, Setting, find_versions
from benchmarks.table import Row, draw_chart, format_host_parts, format_markdown, make_row
from files.atomic_writes import write_text
from launch.program import print_error
from models.shapes import SHAPES
from monitoring.host_time import read_host_time
from options.errors import UserError

ROOT = Path(__file__).parent.parent


def ensure_checkpoint(shape: str, root: Path) -> Path:
    """Return the folder of the shape's checkpoint below `root`, making it at the first call.

    Raises UserError if the disk has no room, or if it cannot be made.
    """
    folder = root / f"random-{shape}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    size, free = 2 * SHAPES[shape].parameters(), shutil.disk_usage(root).free
    if size > free:
        raise UserError(f"--checkpoints {root}: {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    temporary = root / f"{folder.name}.{os.getpid()}.tmp"
    # A child process, so that its GPU memory is freed.
    done = subprocess.run([sys.executable, "-m", "benchmarks.make_checkpoint", temporary, shape], cwd=ROOT)
    if done.returncode:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"--checkpoints {root}: the checkpoint could not be made; its message is above")
    temporary.rename(folder)
    return folder


def run_process(
    command: list[str], log: Path, limit_seconds: float, gpus: int, folder: Path | None = None
) -> str:
    """Run a command, then kill what it left running. Return an error text, or "".

    Args:
        command: the command line.
        log: file for its output.
        limit_seconds: seconds that it may take.
        gpus: number of GPUs that it may see.
        folder: where it runs; None = in a scratch folder.
    """
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    # A process that sees several GPUs would use them all.
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices.split(",")[:gpus])}
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder or scratch,
            env=os.environ | visible,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            return f"took longer than {limit_seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"failed: {find_error_line(log.read_text(errors='replace'), status)}" if status else ""


def find_error_line(text: str, status: int) -> str:
    """Return the last error line in a failed run's output, else its last line, cut at 200 characters."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [
        line for line in lines if re.match(r"(\[rank\d+\]: )?(error: |[\w.]*(Error|Exception)\b)", line)
    ]
    # torchrun and accelerate add these lines, which only say that a process failed.
    causes = [line for line in errors if not re.search("ChildFailedError|CalledProcessError", line)]
    return (causes or errors or lines or [f"exit status {status}"])[-1][:200]


def measure_system(options: Options, name: str, setting: Setting, model: Path, precision: str = "") -> Row:
    """Run one system and return its row; if it cannot run or fails, the row says why.

    Only ours uses `precision`; peers choose their own.

    Args:
        options: options of the benchmark.
        name: the system's name.
        setting: work to measure.
        model: folder of the checkpoint.
        precision: --precision of ours.
    """
    label = f"{name} --precision {precision}" if precision else name
    on_gpus = torch.cuda.is_available()
    problem = find_missing(options, name)
    problem = problem or SYSTEMS[name].find_obstacle(setting, on_gpus, options.has_experts)
    if problem:
        return Row(setting, name, label, problem=problem)
    row = run_system(options, Row(setting, name, label), model, precision)
    if row.problem or not options.host_context:
        return row
    short = dataclasses.replace(options, context_length=options.host_context)
    host = run_system(short, Row(setting, name, label), model, precision, "host")
    has_parts = name == OURS and options.host_parts and not host.problem
    parts = measure_host_parts(short, host, model, precision) if has_parts else None
    return dataclasses.replace(row, host_seconds=host.step_seconds, host_parts=parts)


def measure_host_parts(options: Options, row: Row, model: Path, precision: str) -> dict[str, float] | None:
    """Run ours under the profiler; return the host's seconds in a step by part, None if the run failed.

    The profiler slows the host, and `--cuda_graphs auto` records nothing beside it.

    Args:
        options: options of the benchmark, with few tokens in a row.
        row: of the run without the profiler.
        model: folder of the checkpoint.
        precision: --precision of ours.
    """
    folder = options.out / "profile"
    profile = f"--profile --profiling_output {shlex.quote(str(folder))} --profiling_frequency {options.steps}"
    with_profile = dataclasses.replace(options, train_options=f"{options.train_options} {profile}")
    problem = run_system(with_profile, row, model, precision, "profiled").problem
    tables = list(folder.glob("iteration_*/rank0_host_time.txt"))
    return None if problem or not tables else read_host_time(tables[0].read_text())


def run_system(options: Options, row: Row, model: Path, precision: str, suffix: str = "") -> Row:
    """Run a system; return `row` with its figures, or with its problem.

    Args:
        options: options of the benchmark.
        row: the setting and the system.
        model: folder of the checkpoint.
        precision: --precision of ours.
        suffix: of the names of the run's log and folder.
    """
    setting, name = row.setting, row.system
    slug = "-".join(filter(None, (name, *map(str, dataclasses.astuple(setting)), precision, suffix)))
    log = options.out / f"{slug}.log"
    work = dataclasses.asdict(setting) | {
        "model_name": model,
        "batch_size": options.batch_size,
        "context_length": options.context_length,
        "lora_rank": options.lora_rank,
        "steps": options.steps,
    }
    if name == OURS:
        work |= {"precision": precision, "output_dir": options.out / slug}
        work |= {"train_options": options.train_options}
    if name == "fsdp_qlora":
        work["fsdp_qlora"] = options.fsdp_qlora
    argv = [f"--{key}={value}" for key, value in work.items()]
    command = [*SYSTEMS[name].command(options.python(name), setting.gpus), *argv]
    problem = run_process(command, log, options.time_limit, setting.gpus)
    printed = re.findall(r"RESULT (\{.*\})", log.read_text(errors="replace"))
    if not problem and not printed:
        problem = "printed no result"
    if problem:
        return dataclasses.replace(row, problem=problem)
    tokens = options.batch_size * setting.gpus * options.context_length
    try:
        return make_row(setting, name, row.label, json.loads(printed[-1]), tokens, options.steps)
    except ValueError as e:
        return dataclasses.replace(row, problem=str(e))


def find_missing(options: Options, name: str) -> str:
    """Return a text on the packages or the option that the system lacks here, or "" if it lacks none."""
    if name == "fsdp_qlora" and options.fsdp_qlora is None:
        return "not given: --fsdp_qlora PATH"
    versions = find_versions(SYSTEMS[name], options.python(name))
    missing = [package for package in SYSTEMS[name].required_packages if versions[package] is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def measure_all(options: Options, model: Path) -> list[Row]:
    """Measure all systems in all settings and return their rows; write the results after each run."""
    rows, about = [], describe_setup(options)
    for setting in itertools.starmap(
        Setting, itertools.product(options.gpus, options.train_types, options.checkpointing)
    ):
        runs = [(OURS, precision) for precision in options.precision] + [(peer, "") for peer in options.peers]
        for name, precision in runs:
            rows.append(measure_system(options, name, setting, model, precision))
            row = rows[-1]
            outcome = row.problem or f"{row.tokens_per_second_per_gpu:,.0f} tokens/s, {row.peak_gib:.2f} GiB"
            print(f"{setting}: {row.label}: {outcome}", flush=True)
            write_results(options.out, about, rows)  # after each run, in case the rest is interrupted
    return rows


def describe_setup(options: Options) -> list[str]:
    """Return the lines above the table: machine, versions, work, command."""
    gpus = torch.cuda.device_count()
    machine = f"No GPU (CPU processes in their place), {os.cpu_count()} processors"
    if gpus:  # in a child process: this process must not allocate GPU memory
        command = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
        name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        machine = f"{gpus} x {name}"
    lines = [f"{datetime.date.today()}. {machine}. Versions:", ""]
    for name in (OURS, *options.peers):
        if not find_missing(options, name):
            versions = find_versions(SYSTEMS[name], options.python(name))
            shown = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
            lines.append(f"- {name}: {shown}")
    linears = "four linears of attention" if options.has_experts else "seven linears"
    host = (
        f" Host: the step of a run on rows of {options.host_context} tokens, with which the GPU has little"
        " to do. The second table, if any, has the host's seconds in such a step of ours by part, under the"
        " profiler, which slows the host. `--cuda_graphs auto` records nothing beside it."
    )
    memory = "allocated by torch on the fullest GPU" if gpus else "the largest resident size of a process"
    return [
        *lines,
        "",
        f"{options.shape} shape with random weights, {options.batch_size} rows of {options.context_length}"
        f" tokens per GPU and step, rank {options.lora_rank} on all {linears}, {options.steps} steps; the"
        f" step is the median of the later ones. Memory: {memory}, loading included. `x ours`: relative to"
        " the first row of ours." + host * bool(options.host_context),
        "",
        "    " + shlex.join(["python", "-m", "benchmarks.run", *options.argv]),
        "",
    ]


def write_results(folder: Path, about: list[str], rows: list[Row]) -> None:
    """Write results.md and results.json into `folder`. about: the lines above the table."""
    tables = format_markdown(rows), format_host_parts(rows)
    write_text(folder / "results.md", "\n".join(about) + "\n" + "\n".join(filter(None, tables)))
    results = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")


def main(argv: list[str]) -> int:
    """Run the benchmark. Return the exit status: 0, or 2 for an error that the user can fix.

    A peer that fails is a row, not an error.
    """
    try:
        options = parse(argv)
        gpus = torch.cuda.device_count()
        if gpus and max(options.gpus) > gpus:
            raise UserError(f"--gpus {max(options.gpus)}: this machine has {gpus}")
        model = ensure_checkpoint(options.shape, options.checkpoints)
        options.out.mkdir(parents=True, exist_ok=True)
        rows = measure_all(options, model)
    except UserError as e:
        return print_error(e, verbose=False)
    print((options.out / "results.md").read_text(), end="")
    chart = "speed_memory.png, " if any(not row.problem for row in rows) else ""
    if chart:
        title = f"{options.shape} shape, {options.context_length} tokens"
        draw_chart(rows, title, options.out / "speed_memory.png")
    print(f"in {options.out}: results.md, results.json, {chart}the output of each run")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
