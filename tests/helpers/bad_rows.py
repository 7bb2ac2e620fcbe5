"""Runs with a row whose loss is NaN, and a run that ends because of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.make_checkpoint import byte_tokenizer
from tests.helpers import tiny
from tests.helpers.expansion import edit_config
from tests.helpers.programs import run_here
from tests.helpers.stored import put_tensor, read_stored_tensor

EMBEDDING = "model.embed_tokens.weight"
BAD_ROW = 5  # of 12, from 1
SECRETS = {"HF_TOKEN": "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", "WANDB_API_KEY": "5ec2e7" * 6 + "abcd"}


def write_bad_row_run(base: Path, folder: Path) -> list:
    """Write a model and 12 rows, one with a NaN loss; return the options of a run of three steps of 4 rows.

    The embedding of a letter that only BAD_ROW has is zero, and the norms divide by the root of its mean
    square, with an epsilon of 0.
    """
    model = shutil.copytree(base, folder / "model")
    edit_config(model, rms_norm_eps=0.0)
    embedding = read_stored_tensor(model, EMBEDDING)
    embedding[byte_tokenizer()("z")["input_ids"][-1]] = 0
    put_tensor(model, EMBEDDING, embedding)
    rows = tiny.write_alpaca(folder / "rows.jsonl", 12).read_text().splitlines()
    assert "z" not in "".join(rows)
    row = json.loads(rows[BAD_ROW - 1])
    rows[BAD_ROW - 1] = json.dumps(row | {"output": "z" + row["output"]})
    (folder / "rows.jsonl").write_text("\n".join(rows))
    options = "--train_type bnb_dora --lora_rank 8 --lr 1e-2 --seed 3".split()
    return ["--model_name", model, "--dataset", folder / "rows.jsonl", *options]


def run_until_bad_row(args: list, out: Path) -> tuple[Path, int, str, str]:
    """Run train.py until --max_bad_steps 0 ends it; return (folder, exit status, stdout, stderr).

    There are secrets in the environment, and everything that might print them is switched on.
    """
    options = ["--batch_size", "4", "--world_size", "1", "--max_bad_steps", "0", "--output_dir", out]
    options += (
        "--log_to wandb --verbose --sample_every 2 --sample_tokens 2 --eval_share 0.1 --save_every 1".split()
    )
    return out, *run_here([*args, *options], **SECRETS)
