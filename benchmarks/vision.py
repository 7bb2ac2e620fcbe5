"""Measure training on images, ours beside TRL and transformers + PEFT: images/s and peak memory.

    python -m benchmarks.vision /tmp/gemma3     Gemma-3-4B's shape on one GPU, about 5 minutes
    python -m benchmarks.vision /tmp/tiny --shape tiny-gemma3 --batch_size 2 --text_tokens 64     a rehearsal

The work: random weights of the shape, one image and so many tokens of text a row, QDoRA. The first argument
is a folder, in which the checkpoint and the images are made at the first call. Ours decodes its images as any
run does; the peers get their pixels ready-made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.make_checkpoint import make_checkpoint
from models.shapes import SHAPES, Gemma3Shape

ROOT = Path(__file__).parents[1]
WARMUP_STEPS = 4  # ours compiles in the first ones
FRAME_TOKENS = (
    24  # of a row of ours at most beside its text: BOS, EOS, an image's frame, "Question:" and so on
)


def main(argv: list[str]) -> None:
    """Measure the systems, and print a line for each."""
    options = parse(argv)
    shape = SHAPES[options.shape]
    assert isinstance(shape, Gemma3Shape)
    folder = Path(options.folder).absolute()
    if not (folder / "model").is_dir():
        make_checkpoint(folder / "model", options.shape)
    rows = write_rows(folder, options.batch_size * options.steps, shape.tower.side, options.text_tokens)
    for name in options.systems.split(","):
        try:
            found = (
                measure_ours(options, folder, rows, shape)
                if name == "ours"
                else measure_peer(options, folder, name)
            )
        except subprocess.CalledProcessError as e:
            print(f"{name}: failed with status {e.returncode}", flush=True)
            continue
        seconds = statistics.median(found["step_seconds"][WARMUP_STEPS - 1 :])
        rate = options.batch_size / seconds
        print(
            f"{name}: {rate:.2f} images/s, {seconds:.3f} s a step, peak {found['peak_gib']:.2f} GiB",
            flush=True,
        )


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision")
    parser.add_argument("folder")
    shapes = [name for name, shape in SHAPES.items() if isinstance(shape, Gemma3Shape)]
    parser.add_argument("--shape", default="gemma3-4b", choices=shapes)
    parser.add_argument("--train_type", default="bnb_dora", choices=("qlora", "bnb_dora"))
    parser.add_argument("--systems", default="ours,trl,loop", help="some of these, in this order")
    defaults = {"batch_size": 8, "text_tokens": 256, "lora_rank": 16, "steps": 14}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--train_options", default="", help="more options of train.py")
    return parser.parse_args(argv)


def write_rows(folder: Path, count: int, side: int, text_tokens: int) -> Path:
    """Write so many JPEGs and rows, which the byte tokenizer makes `text_tokens` long beside their image."""
    generator, path = np.random.default_rng(0), folder / "rows.jsonl"
    lines = []
    for i in range(count):
        name = f"{i}.jpg"
        coarse = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        coarse.resize((side, side)).save(folder / name)
        lines.append(json.dumps({"image": name, "text": "x" * text_tokens}))
    path.write_text("\n".join(lines) + "\n")
    return path


def measure_ours(options: argparse.Namespace, folder: Path, rows: Path, shape: Gemma3Shape) -> dict:
    """Return {step_seconds, peak_gib} of train.py."""
    run = folder / "run"
    argv = {
        "model_name": folder / "model",
        "dataset": rows,
        "train_type": options.train_type,
        "lora_rank": options.lora_rank,
        "batch_size": options.batch_size,
        "context_length": shape.image_tokens + options.text_tokens + FRAME_TOKENS,
        "world_size": 1,
        "save_model": False,
        "log_to": "stdout",
        "overwrite": True,
        "output_dir": run,
    }
    words = [text for name, value in argv.items() for text in (f"--{name}", str(value))]
    run_program(["train.py", *words, *options.train_options.split()])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "step_seconds": [step["step_seconds"] for step in steps],
        "peak_gib": max(step["memory_allocated_gib"] for step in steps),
    }


def measure_peer(options: argparse.Namespace, folder: Path, peer: str) -> dict:
    """Return {step_seconds, peak_gib} of a peer: trl, or loop, a plain loop of transformers and PEFT."""
    words = ["--model_name", str(folder / "model"), "--train_type", options.train_type]
    for name in ("batch_size", "text_tokens", "lora_rank", "steps"):
        words += [f"--{name}", str(getattr(options, name))]
    output = run_program([f"benchmarks/peers/vision_{peer}.py", *words])
    return json.loads(output.rpartition("RESULT ")[2])


def run_program(words: list[str]) -> str:
    """Run a program of this repository, and return its output. Raises CalledProcessError if it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
    done.check_returncode()
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
