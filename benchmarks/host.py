"""Measure the host's part of a step, with and without CUDA graphs: steps in which the GPU holds nothing up.

    python -m benchmarks.host                       a model of 8B's 32 layers and 256 features, on one GPU
    python -m benchmarks.host --busy 4              beside four processes that keep processors busy
    python -m benchmarks.host --gpus 2              on CPUs: two processes and gloo, without graphs
    python -m benchmarks.host --model_name /tmp/8b --context_length 2048    whole steps of the 8B shape

Rows are short, so that a kernel takes less time than its launch: a step takes as long as the host. What the
host does depends on the number of layers and linears, hardly on their sizes or on the number of tokens. A run
takes its first steps without graphs, and then records them: both are measured in one process. `sharded` units
are FSDP's, also on a single GPU (benchmarks/host_run.py); `whole` is how train.py runs on one GPU.

Writes into --out: host.md, the table; host.json; and the output of each run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.host_run import RECORD_AFTER, SHARDED
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.run import ROOT
from files.atomic_writes import write_text
from files.names import METRICS

SHAPE = "thin"
WARMUP_STEPS = 5  # first steps that are not measured: compilation, the allocator, clocks
RECORDING_STEPS = 3  # not measured either: layers are recorded, compared, and replayed for the first time


def main(argv: list[str]) -> None:
    """Measure, and print the table."""
    options = parse(argv)
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    model = Path(options.model_name).absolute() if options.model_name else out / f"random-{SHAPE}"
    if not model.is_dir():
        make_checkpoint(model, SHAPE)
    rows: list[dict[str, str]] = []
    for train_type, units in itertools.product(options.train_types.split(","), options.units.split(",")):
        with busy_processes(options.busy):
            steps = run(options, model, out / f"{train_type}-{units}-{options.busy}", train_type, units)
        about = {"train type": train_type, "units": units, "busy processes": str(options.busy)}
        rows.append(about | describe(steps, options.steps))
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        write_text(out / "host.json", json.dumps(rows, indent=2) + "\n")
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    write_text(out / "host.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    print((out / "host.md").read_text(), end="")


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host")
    parser.add_argument("--model_name", help=f"a checkpoint; default: one of the shape {SHAPE}, made once")
    parser.add_argument("--gpus", type=int, default=1, help="ranks; CPU processes where there is no GPU")
    parser.add_argument("--train_types", default="qlora,bnb_dora")
    parser.add_argument("--units", default="sharded,whole")
    parser.add_argument("--busy", type=int, default=0, help="processes that keep processors busy beside it")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--context_length", type=int, default=64)
    parser.add_argument("--lora_rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="measured steps without graphs, and with them")
    parser.add_argument("--train_options", default="", help="more options of train.py")
    parser.add_argument("--out", type=Path, default=Path("host_time"))
    return parser.parse_args(argv)


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep so many processes busy meanwhile."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(options: argparse.Namespace, model: Path, folder: Path, train_type: str, units: str) -> list[dict]:
    """Train; return what metrics.jsonl has of each step. Raises CalledProcessError if the run fails."""
    steps = WARMUP_STEPS + options.steps + RECORDING_STEPS + options.steps
    rows = folder.with_name("rows.jsonl")
    count = options.batch_size * options.gpus * steps
    write_text(rows, (json.dumps({"text": "x" * options.context_length}) + "\n") * count)
    arguments = {
        "model_name": model,
        "train_type": train_type,
        "cuda_graphs": "true",
        "dataset": rows,
        "world_size": options.gpus,
        "batch_size": options.batch_size,
        "context_length": options.context_length,
        "lora_rank": options.lora_rank,
        "save_model": False,
        "log_to": "stdout",
        "verbose": True,
        "overwrite": True,
        "output_dir": folder,
    }
    words = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    settings = {RECORD_AFTER: str(WARMUP_STEPS + options.steps)}
    if units == "sharded":
        settings[SHARDED] = "1"
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.host_run", *words, *options.train_options.split()],
            cwd=ROOT,
            env=os.environ | settings,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def describe(steps: list[dict], count: int) -> dict[str, str]:
    """Return the cells of a run's steps: `count` measured ones without graphs, and then with them."""
    plain, graphed = steps[WARMUP_STEPS : WARMUP_STEPS + count], steps[-count:]
    cells, medians = {}, []
    for name, part in (("without graphs", plain), ("with graphs", graphed)):
        seconds = [step["step_seconds"] for step in part]
        peak = max(step["memory_allocated_gib"] for step in part)
        medians.append(statistics.median(seconds))
        cells[name] = f"{medians[-1]:.3f} s, slowest {max(seconds):.3f} s, {peak:.2f} GiB"
    return cells | {"ratio": f"{medians[1] / medians[0]:.2f}"}


if __name__ == "__main__":
    main(sys.argv[1:])
