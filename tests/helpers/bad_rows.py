"""Runs over a row that is NaN to their model, and one that it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.make_checkpoint import byte_tokenizer
from tests.helpers import tiny
from tests.helpers.expansion import edit
from tests.helpers.programs import ROOT
from tests.helpers.stored import put_tensor, stored

EMBEDDING = "model.embed_tokens.weight"
BAD_ROW = 5  # of 12, from 1
SECRETS = {"HF_TOKEN": "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", "WANDB_API_KEY": "5ec2e7" * 6 + "abcd"}


def poisoned_options(base: Path, folder: Path) -> list:
    """Options of a run in three steps of 4 rows, one of which is really NaN: a letter that only BAD_ROW has is zeros in
    the model's embedding, and the norms divide by the root of its mean square, with nothing added to it."""
    model = shutil.copytree(base, folder / "model")
    edit(model, rms_norm_eps=0.0)
    embedding = stored(model, EMBEDDING)
    embedding[byte_tokenizer()("z")["input_ids"][-1]] = 0
    put_tensor(model, EMBEDDING, embedding)
    rows = tiny.write_alpaca(folder / "rows.jsonl", 12).read_text().splitlines()
    assert "z" not in "".join(rows)
    spoilt = json.loads(rows[BAD_ROW - 1])
    rows[BAD_ROW - 1] = json.dumps(spoilt | {"output": "z" + spoilt["output"]})
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return ["--model_name", model, "--dataset", folder / "rows.jsonl", "--train_type", "bnb_dora", "--lora_rank", "8",
            "--lr", "1e-2", "--seed", "3"]  # fmt: skip


def ended_run(poisoned: list, out: Path) -> tuple[Path, int, str, str]:
    """(folder, exit status, stdout, stderr) of a run that --max_bad_steps 0 ends, started as users start one, with
    all that can tell secrets switched on, and secrets in its environment."""
    options = ["--batch_size", "4", "--world_size", "1", "--max_bad_steps", "0", "--output_dir", out]
    options += (
        "--log_to wandb --verbose --sample_every 2 --sample_tokens 2 --eval_share 0.1 --save_every 1".split()
    )
    command = [sys.executable, "train.py", *map(str, [*poisoned, *options])]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | SECRETS, capture_output=True, text=True, timeout=150
    )
    return out, done.returncode, done.stdout, done.stderr
