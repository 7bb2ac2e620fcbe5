"""Peer: answer.ai's fsdp_qlora, from a checkout of it, by its own train.py.

It prints no times: a step's end is when its progress bar moves on, which it does after it has waited for the step's
loss. It fills the context of its --dataset dummy as we do ours.
"""

import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
import time

from work import LORA_ALPHA, read_work, tell

work = read_work("fsdp_qlora")
TRAIN_TYPES = {"qlora": "custom_qlora", "bnb_dora": "bnb_dora"}
options = {
    "train_type": TRAIN_TYPES[work.train_type],
    "model_name": work.model_name,
    "world_size": work.gpus,
    "dataset": "dummy",
    "dataset_samples": work.batch_size * work.gpus * work.steps,
    "batch_size": work.batch_size,
    "context_length": work.context_length,
    "lora_rank": work.lora_rank,
    "lora_alpha": LORA_ALPHA,
    "lora_dropout": 0.0,
    "precision": "bf16",
    "use_gradient_checkpointing": work.checkpointing != "none",
    "use_activation_cpu_offload": work.checkpointing == "offload",
    "reentrant_checkpointing": False,
    "use_cpu_offload": False,
    "low_memory": True,
    "log_to": "tqdm",
    "verbose": True,  # every rank tells its memory
}
dash = int(importlib.metadata.version("fastcore").partition(".")[0]) >= 2  # how it spells options since then
argv = [
    text
    for name, value in options.items()
    for text in (f"--{name.replace('_', '-') if dash else name}", str(value))
]
process = subprocess.Popen(
    [sys.executable, "train.py", *argv],
    cwd=work.fsdp_qlora,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=os.environ | {"PYTHONUNBUFFERED": "1"},
)
ends, shown = {}, b""
while chunk := process.stdout.read1():
    sys.stdout.buffer.write(chunk)
    sys.stdout.flush()
    shown += chunk
    for bar in re.findall(rb"(\d+)/%d \[" % work.steps, shown):
        ends.setdefault(int(bar), time.perf_counter())
status = process.wait()
if status:
    sys.exit(status)
times = [ends[i] for i in range(1, work.steps + 1)]
peaks = re.findall(rb"Peak allocated memory: ([\d.]+) GiB", shown)
tell(
    step_seconds=[b - a for a, b in itertools.pairwise(times)],
    tokens=work.batch_size * work.gpus * work.context_length,
    peak_gib=max(map(float, peaks)),
    adapters="bfloat16",
)
