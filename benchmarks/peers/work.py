"""What the measured scripts share: their options and the one line that they print.

    RESULT {"step_seconds": [...], "tokens": ..., "peak_gib": ..., "adapters": "float32"}

step_seconds: of the steps, in order, from the end of one to the end of the next; tokens: those that went into a step
of all ranks, as counted in front of the model; peak_gib: most that was allocated on a GPU, loading included, of the
rank with most (on a CPU: the largest resident size of a process); adapters: the dtype of the trained weights.

The scripts run in the environment of the peer, which need not be ours: nothing here imports from the rest of this
repository.
"""

from __future__ import annotations

import argparse
import json
import os

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LORA_ALPHA = 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read_work(*more: str) -> argparse.Namespace:
    """The command line of a script. more: names of options that only this one has."""
    parser = argparse.ArgumentParser()
    for name in ("model_name", "train_type", "checkpointing", *more):
        parser.add_argument(f"--{name}", required=True)
    for name in ("gpus", "batch_size", "context_length", "lora_rank", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def tell(**result) -> None:
    """Prints the line, once for all ranks."""
    if RANK == 0:
        print("RESULT", json.dumps(result), flush=True)
