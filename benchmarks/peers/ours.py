"""Ours, as users run it: train.py, and its metrics.jsonl and run.json."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from work import LORA_ALPHA, print_result, read_work

ROOT = Path(__file__).parents[2]
CHECKPOINTING = {
    "full": {"use_gradient_checkpointing": True},
    "none": {"use_gradient_checkpointing": False},
    "offload": {"use_gradient_checkpointing": True, "use_activation_cpu_offload": True},
}

work = read_work("precision", "output_dir", "train_options")
options = {
    "model_name": work.model_name,
    "train_type": work.train_type,
    "dataset": "dummy",
    "dataset_samples": work.batch_size * work.gpus * work.steps,  # one epoch of full steps
    "world_size": work.gpus,
    "batch_size": work.batch_size,
    "context_length": work.context_length,
    "lora_rank": work.lora_rank,
    "lora_alpha": LORA_ALPHA,
    "precision": work.precision,
    "save_model": False,
    "log_to": "stdout",
    "output_dir": work.output_dir,
    **CHECKPOINTING[work.checkpointing],
}
argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
status = subprocess.run(
    [sys.executable, "train.py", *argv, *shlex.split(work.train_options)], cwd=ROOT
).returncode
if status:
    sys.exit(status)
run = Path(work.output_dir)
steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
padding = json.loads((run / "run.json").read_text())["data"]["padding_share"]
if padding:
    sys.exit(
        f"error: {padding:.0%} of the positions are padding, which counts as no token but takes its time"
    )
print_result(
    step_seconds=[step["step_seconds"] for step in steps],
    tokens=sum(step["tokens"] for step in steps) / len(steps),
    peak_gib=max(step["memory_allocated_gib"] for step in steps),
    adapters="bfloat16" if work.precision == "bf16" else "float32",  # launch/precision.py
)
