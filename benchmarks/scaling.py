"""Measure how the speed scales with the number of GPUs, the most valuable runs first.

    python -m benchmarks.scaling /tmp/8b /tmp/70b --out /tmp/scaling     each is a checkpoint, maybe `empty`
    python -m benchmarks.scaling /tmp/tiny /tmp/tiny --gpus 2 --steps 6 ...     a rehearsal on CPU processes

Weak scaling gives each GPU 4 rows, strong scaling 32 rows to all. Each run is a program of its own. Started
again with the same --out, it makes the runs that are missing. Writes into --out: rows.jsonl, a line as each
run ends; scaling.md, the table; scaling.png; and each run's output.

A run's last steps are recorded by the profiler, and do not count for its speed: they show the communication
that no computation hides, and the host's time, both on rank 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.run import ROOT, run_process
from benchmarks.side_by_side import ALL_GIB
from benchmarks.traces import exposed_seconds
from files.atomic_writes import write_text
from files.names import METRICS
from monitoring.host_time import BUSY, read_host_time

WARMUP_STEPS = 5  # first steps that do not count
PROFILER_WARMUP, PROFILED_STEPS = 1, 2  # last steps, which do not count either


@dataclass(frozen=True)
class Work:
    """One run.

    Attributes:
        name: of the series that it belongs to.
        gpus: ranks.
        rows: per GPU and step.
        options: of train.py.
        is_large: whether it is the 70B shape.
    """

    name: str
    gpus: int
    rows: int
    options: str
    is_large: bool = False


@dataclass(frozen=True)
class Row:
    """The result of a run; figures are None if there is a problem, or no GPU.

    Attributes:
        work: what was run.
        tokens_per_second: per GPU.
        step_seconds, slowest_seconds: median and maximum of the steps that count.
        exposed_seconds: communication per step that no computation hides.
        host_seconds: the host's time per step, under the profiler, which slows it.
        peak_gib: of the fullest rank.
        loss: of the last step.
        problem: why there is no result, or "".
    """

    work: Work
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    slowest_seconds: float | None = None
    exposed_seconds: float | None = None
    host_seconds: float | None = None
    peak_gib: float | None = None
    loss: float | None = None
    problem: str = ""


def list_work(most: int, rows: int, all_rows: int) -> list[Work]:
    """Return the runs on up to `most` GPUs, the most valuable ones first.

    Args:
        most: GPUs of the machine.
        rows: per GPU, in weak scaling.
        all_rows: of all GPUs together, in strong scaling.
    """
    numbers = [n for n in (64, 32, 16, 8, 4, 2, 1) if n <= most]
    full = "--sharding_strategy full_shard"
    work = [
        Work(f"{train_type}, full_shard", n, rows, f"--train_type {train_type} {full}")
        for train_type in ("qlora", "bnb_dora")
        for n in numbers
    ]
    if most > 1:
        grad_op = "--train_type qlora --sharding_strategy shard_grad_op"
        work.append(Work("qlora, shard_grad_op", most, rows, grad_op))
    for group in (2, 4):
        if group < most:
            hybrid = f"--sharding_strategy hybrid_full_shard --hybrid_shard_size {group}"
            work.append(Work(f"qlora, groups of {group}", most, rows, f"--train_type qlora {hybrid}"))
    work += [
        Work(f"qlora, {all_rows} rows in all", n, all_rows // n, f"--train_type qlora {full}")
        for n in numbers
        if all_rows % n == 0
    ]
    if most > 1:
        work.append(Work("70B qlora, full_shard", most, rows, f"--train_type qlora {full}", is_large=True))
    return work


def run(options: argparse.Namespace, work: Work) -> Row:
    """Make a run and return its row."""
    folder = options.out / f"{work.name}-{work.gpus}".replace(", ", "-").replace(" ", "-")
    last = PROFILER_WARMUP + PROFILED_STEPS
    steps = WARMUP_STEPS + options.steps + last
    model, rank = (options.model_70b, 16) if work.is_large else (options.model_8b, options.lora_rank)
    words = [
        *("-m", "benchmarks.limited", str(ALL_GIB), "--model_name", str(model), "--dataset", "dummy"),
        *f"--dataset_samples {steps * work.rows * work.gpus} --world_size {work.gpus}".split(),
        *f"--batch_size {work.rows} --context_length {options.context_length} --lora_rank {rank}".split(),
        *f"--save_model false --log_to stdout --verbose --overwrite --output_dir {folder}".split(),
        *f"--profile --profiling_output {folder}-profile --profiling_frequency {steps}".split(),
        *f"--warmup_steps {PROFILER_WARMUP} --active_steps {PROFILED_STEPS}".split(),
        *work.options.split(),
    ]
    log = Path(f"{folder}.log")
    problem = run_process([sys.executable, *words], log, options.time_limit, work.gpus, ROOT)
    if problem:
        return Row(work, problem=problem)
    metrics = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    counted = metrics[WARMUP_STEPS : len(metrics) - last]
    seconds = [step["step_seconds"] for step in counted]
    median = statistics.median(seconds)
    (cycle,) = Path(f"{folder}-profile").glob("iteration_*")
    host = read_host_time((cycle / "rank0_host_time.txt").read_text())
    return Row(
        work,
        tokens_per_second=work.rows * options.context_length / median,
        step_seconds=median,
        slowest_seconds=max(seconds),
        exposed_seconds=exposed_seconds(cycle / "rank0_trace.json.gz", PROFILED_STEPS),
        host_seconds=host[BUSY],
        peak_gib=max(step["memory_allocated_gib"] for step in counted),
        loss=metrics[-1]["loss"],
    )


def read_rows(path: Path) -> list[Row]:
    """Return the rows of runs that are made already, without those that had a problem."""
    if not path.is_file():
        return []
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [Row(**fields | {"work": Work(**fields["work"])}) for fields in stored]
    return [row for row in rows if not row.problem]


COLUMNS = (
    *("work", "GPUs", "rows per GPU", "tokens/s per GPU", "of one GPU", "step", "slowest"),
    *("exposed communication", "host, profiled", "peak", "last loss"),
)


def one_gpu(row: Row, rows: list[Row]) -> Row | None:
    """Return the run on one GPU to compare a row with: of its series, else with as many rows per GPU."""
    alone = [r for r in rows if r.work.gpus == 1 and r.tokens_per_second]
    series = [r for r in alone if r.work.name == row.work.name]
    others = [r for r in alone if r.work.rows == row.work.rows and not row.work.is_large]
    return next(iter(series + others), None)


def format_table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [[*COLUMNS], ["---"] * len(COLUMNS)]
    for row in rows:
        work = row.work
        alone = one_gpu(row, rows)
        cells = [work.name, str(work.gpus), str(work.rows)]
        if row.tokens_per_second is None:
            lines.append([*cells, row.problem.replace("|", "\\|"), *[""] * 7])
            continue
        ratio = None
        if alone and alone.tokens_per_second:
            ratio = row.tokens_per_second / alone.tokens_per_second
        figures = (
            (row.tokens_per_second, ",.0f", ""),
            (ratio, ".1%", ""),
            (row.step_seconds, ".3f", " s"),
            (row.slowest_seconds, ".3f", " s"),
            (row.exposed_seconds, ".3f", " s"),
            (row.host_seconds, ".3f", " s"),
            (row.peak_gib, ".2f", " GiB"),
            (row.loss, ".4f", ""),
        )
        lines.append([*cells, *("" if x is None else f"{x:{form}}{unit}" for x, form, unit in figures)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: list[Row], path: Path) -> None:
    """Draw the speed per GPU of each series over the number of GPUs, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(row.work.name for row in rows):
        points = sorted((r.work.gpus, r.tokens_per_second) for r in rows if r.work.name == name)
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="GPUs", ylabel="tokens/s per GPU", xscale="log")
    axes.set_xticks(numbers := sorted({row.work.gpus for row in rows}), [str(n) for n in numbers])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Make the runs that are missing, and write table and chart after each."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path, began = options.out / "rows.jsonl", time.monotonic()
    rows = read_rows(path)
    for work in list_work(options.gpus, options.batch_size, options.all_rows):
        if work in [row.work for row in rows]:
            continue
        if options.stop_after and time.monotonic() - began > options.stop_after:
            break
        rows.append(run(options, work))
        with path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(rows[-1])) + "\n")
        write_text(options.out / "scaling.md", format_table(rows))
        if any(row.tokens_per_second for row in rows):
            draw([row for row in rows if row.tokens_per_second], options.out / "scaling.png")
        print(format_table(rows[-1:]).splitlines()[-1], flush=True)
    print(format_table(rows), end="")


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options of the command line, with absolute paths."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("model_8b", type=Path, help="a checkpoint of the 8B shape")
    parser.add_argument("model_70b", type=Path, help="a checkpoint of the 70B shape")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="at most so many ranks")
    parser.add_argument("--batch_size", type=int, default=4, help="rows per GPU, in weak scaling")
    parser.add_argument("--all_rows", type=int, default=32, help="rows of all GPUs, in strong scaling")
    parser.add_argument("--context_length", type=int, default=2048)
    parser.add_argument("--lora_rank", type=int, default=64, help="of the 8B shape; the 70B shape has 16")
    parser.add_argument("--steps", type=int, default=30, help="steps of a run that count")
    parser.add_argument("--time_limit", type=int, default=600, help="seconds that a run may take")
    stop_help = "start no run after so many seconds; 0 = always start it"
    parser.add_argument("--stop_after", type=int, default=0, help=stop_help)
    parser.add_argument("--out", type=Path, default=Path("scaling"))
    options = parser.parse_args(argv)
    for name in ("model_8b", "model_70b", "out"):
        setattr(options, name, getattr(options, name).absolute())
    if not options.gpus:
        parser.error("--gpus: there is no GPU; name a number of CPU processes")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
