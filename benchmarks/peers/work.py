"""Shared by the measured scripts: their options and the one line that they print.

    RESULT {"step_seconds": [...], "tokens": ..., "peak_gib": ..., "adapters": "float32"}

step_seconds: times of the steps in order, from the end of one to the end of the next. tokens: tokens per step
of all ranks, counted at the model's input. peak_gib: largest memory allocated on a GPU, loading included, of
the rank with the most (on a CPU: the largest resident size of a process). adapters: dtype of the trained
weights.

A script runs in the environment of its peer, which may differ from ours: nothing here imports from the rest
of this repository.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LORA_ALPHA = 16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def find_linears(model: str) -> list[str]:
    """Return the names of the linears with adapters: a mixture of experts has them on attention only.

    model: folder of the checkpoint.
    """
    config = json.loads(Path(model, "config.json").read_text())
    return ATTENTION if "num_experts" in config else LINEARS


def read_work(*more: str) -> argparse.Namespace:
    """Parse a script's command line. more: names of text options that only this script has."""
    parser = argparse.ArgumentParser()
    for name in ("model_name", "train_type", "checkpointing", *more):
        parser.add_argument(f"--{name}", required=True)
    for name in ("gpus", "batch_size", "context_length", "lora_rank", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def print_result(**result) -> None:
    """Print `result` as the line RESULT {...}, on rank 0 only."""
    if RANK == 0:
        print("RESULT", json.dumps(result), flush=True)
