"""Peer: answer.ai's fsdp_qlora, by its own train.py from a checkout.

It prints no times. A step ends when its progress bar advances, which happens after it has waited for the
step's loss. Its --dataset dummy fills the context as ours does.
"""

import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
import time

from work import LORA_ALPHA, print_result, read_work

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
    "verbose": True,  # every rank prints its memory
}
has_dashes = int(importlib.metadata.version("fastcore").partition(".")[0]) >= 2  # in names of options
argv = [
    text
    for name, value in options.items()
    for text in (f"--{name.replace('_', '-') if has_dashes else name}", str(value))
]
process = subprocess.Popen(
    [sys.executable, "train.py", *argv],
    cwd=work.fsdp_qlora,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=os.environ | {"PYTHONUNBUFFERED": "1"},
)
ends, output = {}, b""
while chunk := process.stdout.read1():
    sys.stdout.buffer.write(chunk)
    sys.stdout.flush()
    output += chunk
    for bar in re.findall(rb"(\d+)/%d \[" % work.steps, output):
        ends.setdefault(int(bar), time.perf_counter())
status = process.wait()
if status:
    sys.exit(status)
times = [ends[i] for i in range(1, work.steps + 1)]
peaks = re.findall(rb"Peak allocated memory: ([\d.]+) GiB", output)
print_result(
    step_seconds=[b - a for a, b in itertools.pairwise(times)],
    tokens=work.batch_size * work.gpus * work.context_length,
    peak_gib=max(map(float, peaks)),
    adapters="bfloat16",
)
