"""Compare the predicted memory of train.py with what runs of it take, in many settings.

    python -m benchmarks.make_checkpoint /tmp/8b 8b           # or `8b empty`
    python -m benchmarks.make_checkpoint /tmp/1b 1b
    python -m benchmarks.memory /tmp/8b /tmp/1b --edges true

Each setting (benchmarks/memory_settings.py) is a program of its own of three steps. Several run on a GPU at a
time, as far as its memory has room: the figures do not depend on neighbours, and no time is measured. Writes
into --out: rows.jsonl, a line as each run ends; memory.md, the tables; and the output of each run. Started
again, it goes on with what is missing.

GPU memory is what torch allocates on the fullest rank. Host memory is the most that all processes of a run
have at a time: anonymous, shared and page-locked pages, each counted once, and libraries once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import torch

from benchmarks.alpaca_lengths import write_rows
from benchmarks.memory_rows import Row, format_tables, read_rows
from benchmarks.memory_settings import SETTINGS, Options, Setting, parse
from benchmarks.side_by_side import Benchmark, Task
from benchmarks.sparse_models import write_sparse_copy
from files.atomic_writes import write_text
from launch.gpus import Gpu, detect_gpu
from launch.precision import choose_precision
from launch.program import print_error
from launch.ranks import resolve_strategy
from monitoring.memory_model import MemoryEstimate, estimate_memory
from monitoring.run_sizes import run_sizes
from options.errors import UserError
from options.train import parse as parse_training
from training.planned_model import open_planned_model

FACTORS = (1.06, 0.9)  # of the predicted peak: the limits of --edges
BLOCKS = 4  # new ones of the model "8b-pro"
ALPACA_ROWS = 2000


def predict(setting: Setting, model: Path, gpu: Gpu | None) -> MemoryEstimate | None:
    """Return what the setting's run should take; None without a GPU. Its rows fill the context."""
    if gpu is None:
        return None
    config, _ = parse_training(["--model_name", str(model), *setting.options.split()])
    strategy = resolve_strategy(config.sharding_strategy, setting.gpus)
    config = dataclasses.replace(config, world_size=setting.gpus, sharding_strategy=strategy)
    precision, planned = (
        choose_precision(config.precision, True, gpu.has_bf16),
        open_planned_model(str(model)),
    )
    tokens = config.context_length
    sizes = run_sizes(planned.model, planned.family, config, precision, planned.files, tokens)
    return estimate_memory(config, precision, sizes, gpu)


def prepare_models(options: Options) -> dict[str, Path]:
    """Return {model of a setting: its folder}; makes the expanded one, which is `empty`, if it is missing."""
    expanded = options.out / "8b-pro"
    if not expanded.is_dir():
        write_sparse_copy(options.model_8b, expanded, BLOCKS)
    alpaca = options.out / "alpaca.jsonl"
    if not alpaca.is_file():
        write_rows(alpaca, ALPACA_ROWS)
    return {
        "8b": options.model_8b.absolute(),
        "1b": options.model_1b.absolute(),
        "8b-pro": expanded.absolute(),
    }


def find_gpus(options: Options) -> tuple[list[str], Gpu | None]:
    """Return (the GPUs to use, for CUDA_VISIBLE_DEVICES; their kind), ([], None) without any.

    Raises UserError if there are fewer than --gpus.
    """
    count = torch.cuda.device_count()
    if options.gpus > count:
        raise UserError(f"--gpus {options.gpus}: this machine has {count}")
    if options.edges and not count:
        raise UserError("--edges: needs a GPU")
    if not count:
        return [], None
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    return names[: options.gpus if options.gpus > 0 else count], detect_gpu(torch.device("cuda", 0))


def run(options: Options) -> list[Row]:
    """Make the runs that are missing and write the tables; return all rows. Raises UserError."""
    devices, gpu = find_gpus(options)
    options.out.mkdir(parents=True, exist_ok=True)
    models, path = prepare_models(options), options.out / "rows.jsonl"
    chosen = [
        setting
        for setting in SETTINGS
        if setting.name in (options.only or [s.name for s in SETTINGS])
        and (setting.gpus <= len(devices) or not devices)
    ]
    plain = [Task(s, models[s.model], predict(s, models[s.model], gpu)) for s in chosen]
    edges = [
        dataclasses.replace(task, factor=factor)
        for task in plain
        for factor in FACTORS
        if task.setting.is_edge
    ]
    done = {row.name for row in read_rows(path)}
    benchmark = Benchmark(options, devices, gpu.gib if gpu else 0.0)
    tasks = [task for task in plain + edges * options.edges if task.name not in done]
    benchmark.run(tasks)
    rows = read_rows(path)
    write_text(options.out / "memory.md", format_tables(rows, [setting.name for setting in SETTINGS]))
    return rows


def main(argv: list[str]) -> int:
    """Run the benchmark. Return the exit status: 0, or 2 for an error that the user can fix."""
    try:
        options = parse(argv)
        run(options)
    except UserError as e:
        return print_error(e, verbose=False)
    print((options.out / "memory.md").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
