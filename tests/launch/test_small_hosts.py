"""A run on a small host: /dev/shm of 64 MB, 4 threads, and page-locked memory that is refused everywhere.

test_memory.py has limits that allow some of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.alpaca_lengths import draw_lengths
from tests.helpers.programs import ROOT, losses, metrics

# A mount namespace of its own, in which /dev/shm is small for this run alone.
SMALL_SHM = 'mount -t tmpfs -o size=64m none /dev/shm && exec "$@"'
STEPS, ROWS = 200, 60_000


def write_rows(path: Path) -> None:
    """Write Alpaca rows of its lengths, with four characters for each token that Llama's tokenizer makes."""
    with path.open("w") as file:
        for i, tokens in enumerate(draw_lengths(ROWS).tolist()):
            given = "abc " * 20 if i % 5 < 2 else ""
            row = {"instruction": "abc " * 13, "input": given, "output": "abc " * max(tokens - 55, 2)}
            file.write(json.dumps(row) + "\n")


@pytest.mark.slow
def test_alpaca_trains_with_little_shared_memory(checkpoints, tmp_path):
    """Its tokens need more than /dev/shm has. They are bytes here, up to 512 per row."""
    namespace = ["unshare", "--mount", "sh", "-c", SMALL_SHM, "sh"]
    try:
        subprocess.run([*namespace, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a file system")
    write_rows(tmp_path / "rows.jsonl")
    out = tmp_path / "out"
    options = {
        "--model_name": checkpoints(),
        "--dataset": tmp_path / "rows.jsonl",
        "--train_type": "qlora",
        "--lora_rank": 8,
        "--batch_size": 1,
        "--context_length": 512,
        "--max_steps": STEPS,
        "--world_size": 2,
        "--save_every": 90,
        "--use_cpu_offload": "true",
        "--output_dir": out,
    }
    argv = [str(part) for option in options.items() for part in option]
    environment = os.environ | {
        "OMP_NUM_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "true",
        "RAYON_NUM_THREADS": "4",
    }
    done = subprocess.run(
        [*namespace, sys.executable, "-m", "tests.helpers.refused_page_locks", *argv],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"data: {ROWS:,} rows kept" in done.stdout
    assert done.stdout.count("the host refuses page-locked memory") == 1
    parts = ("train.PrefetchedSteps", "train.make_offload_policy", "checkpoints.host_copy", "launch.memory")
    (asked,) = (line for line in done.stdout.splitlines() if line.startswith("asked: "))
    assert all(part in asked for part in parts), asked
    data = next(line for line in done.stdout.splitlines() if line.startswith("data: "))
    tokens = int(data.split("; ")[1].split()[0].replace(",", ""))
    assert 4 * tokens > 64 * 2**20, "int32: more than /dev/shm has"
    assert len(losses(out)) == STEPS and losses(out)[-1] < losses(out)[0] / 2
    assert metrics(out)[-1]["memory_allocated_gib"] < 1.5
