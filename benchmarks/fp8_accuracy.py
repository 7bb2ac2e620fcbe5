"""Measure what fp8 matmuls on the 4-bit base cost in accuracy: losses of a model that is trained here.

    python -m benchmarks.fp8_accuracy --out /tmp/accuracy                  at most 8 minutes on an H200
    python -m benchmarks.fp8_accuracy --shape tiny --ways 16bit,16bit ...  a rehearsal on a CPU

A model of some 100M parameters learns sources and licences that Python and its packages ship (text A,
benchmarks/accuracy_texts.py). It is then fine-tuned on their documentation (text B): with `qlora` and each
--base_matmul of --ways, and with `lora`, whose base has 16 bits. All runs of a seed have the same order of
rows and the same adapters at the start. The loss is train.py's own, on a held-out part of text B, at the end
of each run. It is computed as the run computes: with fp8 matmuls where the run has these.

Started again with the same options, it makes the parts that are missing, and goes on with the pretraining
from its last checkpoint. Writes into --out: rows.jsonl, a line as each part ends; accuracy.json and
accuracy.md, the results; and the output of each run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

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
from benchmarks.paired_losses import T_QUANTILES, Losses, compare, format_tables
from benchmarks.run import ROOT, run_process
from benchmarks.side_by_side import COMPILE_THREADS
from files.atomic_writes import write_text
from files.names import METRICS
from launch.program import print_error
from models.shapes import Shape
from options.errors import UserError

CONTEXT = 1024
SHAPES = {
    "100m": Shape(768, 2048, 12, 12, 12, 16384, CONTEXT, tied=True),
    "tiny": Shape(64, 128, 2, 4, 4, 512, CONTEXT, tied=True),
}
DEFAULT_WAY = "16bit"  # of train.py's --base_matmul
SIZES = ("shape", "pretraining", "fine_tuning", "text", "batch")  # options that all parts share
TEXTS, RANDOM, PRETRAINING = "texts", "random model", "pretraining"


@dataclass(frozen=True)
class Series:
    """Runs that differ only in their seed.

    Attributes:
        name: in tables.
        train_type: of train.py.
        way: how the base's matmuls are computed.
    """

    name: str
    train_type: str
    way: str = DEFAULT_WAY

    def options(self) -> list[str]:
        """Return the options of train.py."""
        way = [] if self.way == DEFAULT_WAY else ["--base_matmul", self.way]
        return ["--train_type", self.train_type, *way]


@dataclass(frozen=True)
class Row:
    """The result of a part.

    Attributes:
        name: of the part.
        seconds: that it took.
        loss: on the held-out text at the end, of a run of train.py.
        tokens_per_second: median over the steps of a run, beside other runs.
        problem: why there is no result, or "".
    """

    name: str
    seconds: float
    loss: float | None = None
    tokens_per_second: float | None = None
    problem: str = ""


def list_series(ways: list[str]) -> list[Series]:
    """Return the series: one with 16-bit weights, and one with 4-bit weights for each way."""
    names = [f"qlora {way}" + " again" * ways[:i].count(way) for i, way in enumerate(ways)]
    return [
        Series("lora", "lora"),
        *(Series(name, "qlora", way) for name, way in zip(names, ways, strict=True)),
    ]


def run_name(series: Series, seed: int) -> str:
    """Return the name of a fine-tuning run."""
    return f"{series.name}, seed {seed}"


class Accuracy:
    """The parts of the measurement, and the rows of those that are made. options: of the command line."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.began = options, time.monotonic()
        self.path = options.out / "rows.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        rows = [Row(**json.loads(line)) for line in lines]
        self.rows = {row.name: row for row in rows if not row.problem}
        self.runs = [(series, seed) for seed in range(options.seeds) for series in list_series(options.ways)]

    def add(self, row: Row) -> None:
        """Write and print a row. Raises UserError if a part that all others need has a problem."""
        with self.path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        loss = "" if row.loss is None else f", loss {row.loss:.4f}, {row.tokens_per_second:,.0f} tokens/s"
        print(f"{row.name}: {row.problem or f'{row.seconds:.0f} s{loss}'}", flush=True)
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
        with ThreadPoolExecutor(self.options.jobs) as pool:
            for done in as_completed([pool.submit(self.fine_tune, *each) for each in self.missing()]):
                if (row := done.result()) is not None:
                    self.add(row)

    def missing(self) -> list[tuple[Series, int]]:
        """Return (series, seed) of the fine-tuning runs without a result."""
        return [each for each in self.runs if run_name(*each) not in self.rows]

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

    def fine_tune(self, series: Series, seed: int) -> Row | None:
        """Train adapters on text B; None if --stop_after is over."""
        stop_after = self.options.stop_after
        if stop_after and time.monotonic() - self.began > stop_after:
            return None
        adapters = f"--lora_rank 16 --lr 5e-4 --seed {seed} --save_model false --overwrite"
        options = [*adapters.split(), *series.options()]
        name, model = run_name(series, seed), self.options.out / PRETRAINING
        return self.train(name, model, TEXT_B, self.options.fine_tuning, 16, options)

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
        folder = out / name.replace(", ", "-").replace(" ", "-")
        steps = max(1, round(tokens * 1e6 / (batch * CONTEXT)))
        words = [
            *("train.py", "--model_name", str(model), "--output_dir", str(folder)),
            *("--dataset", str(out / text), "--eval_dataset", str(out / HELD_OUT)),
            *f"--packing true --context_length {CONTEXT} --batch_size {batch} --max_steps {steps}".split(),
            *"--num_epochs 1000 --lr_scheduler cosine --use_gradient_checkpointing false".split(),
            *"--world_size 1 --log_to stdout".split(),
            *options,
        ]
        began, log = time.monotonic(), out / f"{folder.name}.log"
        problem = run_process([sys.executable, *words], log, self.options.time_limit, 1, ROOT)
        seconds = time.monotonic() - began
        if problem:
            return Row(name, seconds, problem=problem)
        metrics = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        speed = statistics.median(step["tokens_per_second"] for step in metrics)
        return Row(name, seconds, metrics[-1]["eval_loss"], speed)


def write_results(accuracy: Accuracy) -> None:
    """Write and print the tables."""
    options, rows = accuracy.options, accuracy.rows
    losses: Losses = {}
    for series, seed in accuracy.runs:
        row = rows.get(run_name(series, seed))
        losses.setdefault(series.name, {}).update({} if row is None else {seed: row.loss})
    differences, before = compare(losses, list(losses)), rows[PRETRAINING].loss
    text = f"Held-out loss before fine-tuning: {before:.5f}.\n\n{format_tables(losses, differences)}"
    write_text(options.out / "accuracy.md", text)
    results = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "loss_before": before,
        "losses": losses,
        "differences": [dataclasses.asdict(each) for each in differences],
        "rows": [dataclasses.asdict(row) for row in rows.values()],
    }
    write_text(options.out / "accuracy.json", json.dumps(results, indent=2) + "\n")
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
    stop_help = "start no fine-tuning after so many seconds; 0 = always start it"
    parser.add_argument("--stop_after", type=int, default=0, help=stop_help)
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
    options.out.mkdir(parents=True, exist_ok=True)
    accuracy = Accuracy(options)
    try:
        check_same_options(options)
        accuracy.make_all()
    except UserError as e:
        return print_error(e, verbose=False)
    write_results(accuracy)
    missing = [run_name(*each) for each in accuracy.missing()]
    if missing:
        print(f"without a result: {'; '.join(missing)}")
    print(f"{time.monotonic() - accuracy.began:.0f} s in all")
    return 1 if missing else 0


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": COMPILE_THREADS}
    sys.exit(main(sys.argv[1:]))
