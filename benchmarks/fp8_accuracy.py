"""Measure what fp8 matmuls on the 4-bit base cost in accuracy: losses of a model that is trained here.

    python -m benchmarks.fp8_accuracy --out /tmp/accuracy                  meant for 8 minutes of an H200
    python -m benchmarks.fp8_accuracy --shape tiny --ways 16bit,16bit ...  a rehearsal on a CPU

A model of some 100M parameters learns sources and licences that Python and its packages ship (text A,
benchmarks/accuracy_texts.py). It is then fine-tuned on their documentation (text B): with `qlora` and each
--base_matmul of --ways, and with `lora`, whose base has 16 bits. All runs of a seed have the same order of
rows and the same adapters at the start. The loss is train.py's own, on a held-out part of text B, at the end
of each run, which multiplies in 16 bits. At last evaluate.py gives the loss of each `qlora` run with the
matmuls that it was trained with, and that of the NF4 model before fine-tuning.

Started again with the same options, it makes the parts that are missing, and goes on with the pretraining
from its last checkpoint. Writes into --out: rows.jsonl, a line as each part ends; accuracy.json and
accuracy.md, the results; and the output of each run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks import accuracy_rows
from benchmarks.accuracy_rows import PRETRAINING, Row, Run, list_series, summarize
from benchmarks.accuracy_texts import (
    HELD_OUT,
    TEXT_A,
    TEXT_B,
    TOKENIZER_PIECES,
    find_roots,
    read_rows,
    train_tokenizer,
    write_texts,
)
from benchmarks.fp8_errors import check_way
from benchmarks.paired_losses import T_QUANTILES
from benchmarks.run import ROOT, run_process
from benchmarks.side_by_side import COMPILE_THREADS
from files.atomic_writes import write_text
from files.names import METRICS
from launch.program import print_error
from models.shapes import Shape
from options.errors import UserError
from training.base_matmul import check_base_matmul_here

CONTEXT = 1024
SHAPES = {
    "100m": Shape(768, 2048, 12, 12, 12, 16384, CONTEXT, tied=True),
    "tiny": Shape(64, 128, 2, 4, 4, 512, CONTEXT, tied=True),
}
SIZES = ("shape", "pretraining", "fine_tuning", "text", "batch")  # options that all parts share
TEXTS, RANDOM = "texts", "random model"


class Accuracy:
    """The parts of the measurement, and the rows of those that are made. options: of the command line."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.began = options, time.monotonic()
        self.path = options.out / "rows.jsonl"
        self.rows = accuracy_rows.read_rows(self.path)
        # The runs of a seed are neighbours, so that few differences are missing after an interruption.
        self.runs = [Run(each, seed) for seed in range(options.seeds) for each in list_series(options.ways)]

    def add(self, row: Row) -> None:
        """Write and print a row. Raises UserError if a part that all others need has a problem."""
        accuracy_rows.append_row(self.path, row)
        print(row.describe(), flush=True)
        if not row.problem:
            self.rows[row.name] = row
        elif row.name == PRETRAINING:
            raise UserError(f"{row.name}: {row.problem}")

    def make_all(self) -> None:
        """Make the parts that are missing."""
        for name, make in ((TEXTS, self.write_texts), (RANDOM, self.make_model)):
            if name not in self.rows:
                began = time.monotonic()
                make()
                self.add(Row(name, time.monotonic() - began))
        if PRETRAINING not in self.rows:
            self.add(self.pretrain())
        for make, is_evaluation in ((self.fine_tune, False), (self.evaluate, True)):
            work = [run for run in self.missing() if bool(run.series.evaluates) == is_evaluation]
            with ThreadPoolExecutor(self.options.jobs) as pool:
                try:
                    for done in as_completed([pool.submit(self.make_in_time, make, run) for run in work]):
                        if (row := done.result()) is not None:
                            self.add(row)
                except KeyboardInterrupt:
                    pool.shutdown(cancel_futures=True)  # waits for what runs
                    raise

    def missing(self) -> list[Run]:
        """Return the runs without a result."""
        return [run for run in self.runs if run.name not in self.rows]

    def make_in_time(self, make: Callable[[Run], Row | None], run: Run) -> Row | None:
        """Return make(run); None if --stop_after is over."""
        stop_after = self.options.stop_after
        if stop_after and time.monotonic() - self.began > stop_after:
            return None
        return make(run)

    def folder(self, name: str) -> Path:
        """Return the folder of a part's RUN."""
        return self.options.out / name.replace(", ", "-").replace(" ", "-")

    def write_texts(self) -> None:
        """Write the texts, whose sizes the options give in MB."""
        sizes = {HELD_OUT: 1.0, TEXT_B: 8.0, TEXT_A: 120.0}
        limits = {name: round(self.options.text * size * 1e6) for name, size in sizes.items()}
        found = write_texts(self.options.out, find_roots(), limits)
        print(", ".join(f"{name}: {count / 1e6:.1f} MB" for name, count in found.items()), flush=True)

    def make_model(self) -> None:
        """Train the tokenizer and write a model with random weights."""
        shape, folder = SHAPES[self.options.shape], self.options.out / "random"
        texts = read_rows(self.options.out / TEXT_A, TOKENIZER_PIECES)
        tokenizer = train_tokenizer(texts, shape.vocabulary)
        config = shape.model_config()
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters", flush=True)

    def pretrain(self) -> Row:
        """Train all weights on text A, from the last checkpoint of an interrupted run, if it has one."""
        options = "--train_type full --lr 1e-3 --lr_warmup 0.05 --seed 0"
        options += " --save_minutes 1 --keep 1 --resume auto"
        model = self.options.out / "random"
        return self.train(PRETRAINING, model, TEXT_A, self.options.pretraining, 64, options.split())

    def fine_tune(self, run: Run) -> Row:
        """Train adapters on text B."""
        options = [*f"--lora_rank 16 --lr 5e-4 --seed {run.seed} --overwrite".split(), *run.series.options()]
        model = self.folder(PRETRAINING)
        return self.train(run.name, model, TEXT_B, self.options.fine_tuning, 16, options)

    def evaluate(self, run: Run) -> Row | None:
        """Run evaluate.py on a RUN and its base, with the RUN's matmuls; None if the RUN has failed."""
        if run.evaluates not in self.rows:
            return None
        began, out = time.monotonic(), self.folder(run.name).with_suffix(".json")
        words = ["evaluate.py", str(self.folder(run.evaluates)), "--metrics", "perplexity", "--out", str(out)]
        words += ["--base_matmul", run.series.way]
        problem = self.run_program(words, out.with_suffix(".log"))
        seconds = time.monotonic() - began
        if problem:
            return Row(run.name, seconds, problem=problem)
        found = json.loads(out.read_text())["metrics"]["perplexity"]
        return Row(run.name, seconds, math.log(found["tuned"]), math.log(found["base"]))

    def run_program(self, words: list[str], log: Path) -> str:
        """Run a Python program of this project on one GPU, and return an error text, or ""."""
        return run_process([sys.executable, *words], log, self.options.time_limit, 1, ROOT)

    def train(self, name: str, model: Path, text: str, tokens: float, batch: int, options: list[str]) -> Row:
        """Run train.py and return the part's row.

        Args:
            name: of the part.
            model: the folder of the model.
            text: file of the rows.
            tokens: millions to train on.
            batch: packs of CONTEXT tokens of a step, times --batch.
            options: more options of train.py.
        """
        out, batch = self.options.out, max(1, round(batch * self.options.batch))
        folder = self.folder(name)
        steps = max(1, round(tokens * 1e6 / (batch * CONTEXT)))
        words = [
            *("train.py", "--model_name", str(model), "--output_dir", str(folder)),
            *("--dataset", str(out / text), "--eval_dataset", str(out / HELD_OUT)),
            *f"--packing true --context_length {CONTEXT} --batch_size {batch} --max_steps {steps}".split(),
            *"--num_epochs 1000 --lr_scheduler cosine --use_gradient_checkpointing false".split(),
            *"--world_size 1 --log_to stdout".split(),
            *options,
        ]
        began = time.monotonic()
        problem = self.run_program(words, folder.with_suffix(".log"))
        seconds = time.monotonic() - began
        if problem:
            return Row(name, seconds, problem=problem)
        metrics = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        speed = statistics.median(step["tokens_per_second"] for step in metrics)
        return Row(name, seconds, metrics[-1]["eval_loss"], tokens_per_second=speed)


def write_results(accuracy: Accuracy) -> None:
    """Write and print the tables."""
    options = accuracy.options
    text, values = summarize(accuracy.runs, accuracy.rows)
    values["options"] = {name: str(value) for name, value in vars(options).items()}
    write_text(options.out / "accuracy.md", text)
    write_text(options.out / "accuracy.json", json.dumps(values, indent=2) + "\n")
    print(text, end="")


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_accuracy")
    parser.add_argument("--out", type=Path, default=Path("fp8_accuracy"))
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    ways_help = "values of --base_matmul, the baseline first; 16bit,16bit shows what repeating a run changes"
    parser.add_argument("--ways", type=lambda text: text.split(","), default=["16bit", "fp8"], help=ways_help)
    parser.add_argument("--seeds", type=int, choices=range(1, len(T_QUANTILES) + 2), default=5)
    parser.add_argument("--jobs", type=int, default=5, help="fine-tuning runs at a time, all on one GPU")
    parser.add_argument("--pretraining", type=float, default=80, help="millions of tokens")
    parser.add_argument("--fine_tuning", type=float, default=2, help="millions of tokens of each run")
    parser.add_argument("--text", type=float, default=1, help="factor of the texts' sizes")
    parser.add_argument("--batch", type=float, default=1, help="factor of the batch sizes, 64 and 16 packs")
    parser.add_argument("--time_limit", type=int, default=600, help="seconds that a run may take")
    stop_help = "start no fine-tuning or evaluation after so many seconds; 0 = always start it"
    parser.add_argument("--stop_after", type=int, default=420, help=stop_help)
    options = parser.parse_args(argv)
    options.out = options.out.absolute()
    return options


def check_same_options(options: argparse.Namespace) -> None:
    """Raise UserError if --out has parts of other sizes; otherwise write the sizes there."""
    path, sizes = options.out / "sizes.json", {name: getattr(options, name) for name in SIZES}
    if path.is_file() and (made := json.loads(path.read_text())) != sizes:
        raise UserError(f"--out {options.out}: its parts were made with {made}; name another folder")
    write_text(path, json.dumps(sizes))


def main(argv: list[str]) -> int:
    """Make the parts that are missing and print the tables. Return the exit status."""
    options = parse(argv)
    try:
        for way in options.ways:
            check_way(way)
            check_base_matmul_here(way, "auto")
        options.out.mkdir(parents=True, exist_ok=True)
        accuracy = Accuracy(options)
        check_same_options(options)
        accuracy.make_all()
    except UserError as e:
        return print_error(e, verbose=False)
    write_results(accuracy)
    missing = [run.name for run in accuracy.missing()]
    if missing:
        print(f"without a result: {'; '.join(missing)}")
    print(f"{time.monotonic() - accuracy.began:.0f} s in all")
    return 1 if missing else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also ends the program that is running
    os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": COMPILE_THREADS}
    sys.exit(main(sys.argv[1:]))
