"""Measures ours and every installed peer, one after the other, on the same machine and the same work.

    python -m benchmarks.run                                            the 8B shape on one GPU
    python -m benchmarks.run --gpus 1,2 --train_types qlora,bnb_dora --checkpointing full,none --precision auto,bf16
    python -m benchmarks.run --shape tiny --context_length 256         a rehearsal on a CPU

It makes a checkpoint of the shape with random weights, once, and leaves in --out: results.md (a table for
docs/benchmarks.md), results.json, speed_memory.png, and of each run its output and, if it is ours, its RUN folder.
All train on rows that fill the context. A peer that is not installed, cannot do what is asked, fails or takes too
long is a row that says so. Peers that cannot live in one environment are found by --pythons.
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
from benchmarks.shapes import SHAPES
from benchmarks.systems import OURS, SYSTEMS, Setting, installed
from benchmarks.table import Row, draw, markdown, measured
from files.atomic_writes import write_text
from launch.program import print_error
from options.errors import UserError

ROOT = Path(__file__).parent.parent


def make_once(shape: str, root: Path) -> Path:
    """The folder of the shape's checkpoint below root, made at the first call. Raises UserError if it cannot be."""
    folder = root / f"random-{shape}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    size, free = 2 * SHAPES[shape].parameters(), shutil.disk_usage(root).free
    if size > free:
        raise UserError(f"--checkpoints {root}: {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    temporary = root / f"{folder.name}.{os.getpid()}.tmp"
    # In a process of its own, which gives the GPU back.
    made = subprocess.run([sys.executable, "-m", "benchmarks.make_checkpoint", temporary, shape], cwd=ROOT)
    if made.returncode:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"--checkpoints {root}: the checkpoint could not be made; its message is above")
    temporary.rename(folder)
    return folder


def execute(command: list[str], log: Path, limit: float, gpus: int) -> str:
    """Runs a command in a scratch folder, its output into `log`. Returns what went wrong, "" if nothing did. Ends
    all processes that it started."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    # One process that sees several GPUs would use them all.
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(seen.split(",")[:gpus])}
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=scratch,
            env=os.environ | visible,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"took longer than {limit:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"failed: {reason(log.read_text(errors='replace'), status)}" if status else ""


def reason(text: str, status: int) -> str:
    """The line of a failed run's output that says most."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [
        line for line in lines if re.match(r"(\[rank\d+\]: )?(error: |[\w.]*(Error|Exception)\b)", line)
    ]
    # What torchrun and accelerate add says only that a process failed.
    told = [line for line in errors if not re.search("ChildFailedError|CalledProcessError", line)]
    return (told or errors or lines or [f"exit status {status}"])[-1][:200]


def measure(options: Options, name: str, setting: Setting, model: Path, precision: str = "") -> Row:
    """Runs one system. precision: of ours; a peer's is its own choice."""
    label = f"{name} --precision {precision}" if precision else name
    problem = absent(options, name) or SYSTEMS[name].refusal(setting, torch.cuda.is_available())
    if problem:
        return Row(setting, name, label, problem=problem)
    slug = "-".join(filter(None, (name, *map(str, dataclasses.astuple(setting)), precision)))
    log = options.out / f"{slug}.log"
    given = dataclasses.asdict(setting) | {
        "model_name": model,
        "batch_size": options.batch_size,
        "context_length": options.context_length,
        "lora_rank": options.lora_rank,
        "steps": options.steps,
    }
    if name == OURS:
        given |= {"precision": precision, "output_dir": options.out / slug}
        given |= {"train_options": options.train_options}
    if name == "fsdp_qlora":
        given["fsdp_qlora"] = options.fsdp_qlora
    argv = [f"--{key}={value}" for key, value in given.items()]
    command = [*SYSTEMS[name].command(options.python(name), setting.gpus), *argv]
    problem = execute(command, log, options.time_limit, setting.gpus)
    printed = re.findall(r"RESULT (\{.*\})", log.read_text(errors="replace"))
    if not problem and not printed:
        problem = "printed no result"
    if problem:
        return Row(setting, name, label, problem=problem)
    tokens = options.batch_size * setting.gpus * options.context_length
    try:
        return measured(setting, name, label, json.loads(printed[-1]), tokens, options.steps)
    except ValueError as e:
        return Row(setting, name, label, problem=str(e))


def absent(options: Options, name: str) -> str:
    """Why there is no such system here; "" if there is."""
    if name == "fsdp_qlora" and options.fsdp_qlora is None:
        return "not given: --fsdp_qlora PATH"
    versions = installed(SYSTEMS[name], options.python(name))
    missing = [package for package in SYSTEMS[name].needs if versions[package] is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def measure_all(options: Options, model: Path) -> list[Row]:
    rows, about = [], describe(options)
    for setting in itertools.starmap(
        Setting, itertools.product(options.gpus, options.train_types, options.checkpointing)
    ):
        runs = [(OURS, precision) for precision in options.precision] + [(peer, "") for peer in options.peers]
        for name, precision in runs:
            rows.append(measure(options, name, setting, model, precision))
            row = rows[-1]
            found = row.problem or f"{row.tokens_per_second_per_gpu:,.0f} tokens/s, {row.peak_gib:.2f} GiB"
            print(f"{setting}: {row.label}: {found}", flush=True)
            write(options.out, about, rows)  # what there is so far, should the rest be interrupted
    return rows


def describe(options: Options) -> list[str]:
    """The lines above the table: machine, versions, work, command."""
    gpus = torch.cuda.device_count()
    machine = f"No GPU (CPU processes in their place), {os.cpu_count()} processors"
    if gpus:  # asked in a process of its own: this one must take no memory of a GPU
        ask = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
        name = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
        machine = f"{gpus} x {name}"
    lines = [f"{datetime.date.today()}. {machine}. Versions:", ""]
    for name in (OURS, *options.peers):
        if not absent(options, name):
            versions = installed(SYSTEMS[name], options.python(name))
            shown = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
            lines.append(f"- {name}: {shown}")
    memory = "allocated by torch on the fullest GPU" if gpus else "the largest resident size of a process"
    return [
        *lines,
        "",
        f"{options.shape} shape with random weights, {options.batch_size} rows of {options.context_length} tokens per GPU and"
        f" step, rank {options.lora_rank} on all seven linears, {options.steps} steps; the step is the median of the"
        f" later ones. Memory: {memory}, loading included. `x ours`: relative to the first row of ours.",
        "",
        "    " + shlex.join(["python", "-m", "benchmarks.run", *options.argv]),
        "",
    ]


def write(folder: Path, about: list[str], rows: list[Row]) -> None:
    write_text(folder / "results.md", "\n".join(about) + "\n" + markdown(rows))
    results = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, or 2 for something the user can put right. A peer that fails is a row."""
    try:
        options = parse(argv)
        gpus = torch.cuda.device_count()
        if gpus and max(options.gpus) > gpus:
            raise UserError(f"--gpus {max(options.gpus)}: this machine has {gpus}")
        model = make_once(options.shape, options.checkpoints)
        options.out.mkdir(parents=True, exist_ok=True)
        rows = measure_all(options, model)
    except UserError as e:
        return print_error(e, verbose=False)
    print((options.out / "results.md").read_text(), end="")
    drawn = "speed_memory.png, " if any(not row.problem for row in rows) else ""
    if drawn:
        title = f"{options.shape} shape, {options.context_length} tokens"
        draw(rows, title, options.out / "speed_memory.png")
    print(f"in {options.out}: results.md, results.json, {drawn}the output of each run")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
