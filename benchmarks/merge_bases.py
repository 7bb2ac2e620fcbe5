"""What merging into each base costs: the loss on the run's data of the model that was trained, of what export.py
makes of it with either --base, and of those packed again to 4 bits.

    python -m benchmarks.merge_bases RUN [ROWS]

ROWS: rows of the data, from the first (64). The run's data must be a local file or a recipe of one.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import export
from data.batches import StepSampler
from data.rows import IGNORE
from data.tokenizing import prepare
from files.model_folder import CheckpointFiles
from finished.finished_run import load_tokenizer, open_run, read_adapter
from finished.layerwise import packed_logits, plain_logits, trained_logits


def measure(folder: str, count: int) -> None:
    run = open_run(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    c = run.config
    rows = prepare(c.dataset, c.dataset_format, count, c.context_length, load_tokenizer(run), c.chat_date)
    batch = next(StepSampler(rows, len(rows), 1, 0, 1, 0).steps(1)).batches[0]

    def tell(name: str, logits: torch.Tensor) -> None:
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE).item()
        learned = batch.targets != IGNORE
        away = (logits - trained)[learned].abs()
        print(
            f"{name:38} loss {loss:.4f}, logits differ by up to {away.max().item():.4f}, on average"
            f" {away.mean().item():.4f}"
        )

    trained = trained_logits(run, read_adapter(run), batch.ids, device)
    tell("trained", trained)
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("dequantized", "original"):
            out = Path(scratch, name)
            options = ["--to", "merged", "--out", str(out), "--base", name, "--check", "false"]
            assert export.main([folder, *options]) == 0
            files = CheckpointFiles(out)
            tell(f"merged into {name}", plain_logits(run.model_config, run.family, files, batch.ids, device))
            again = dataclasses.replace(run, files=files)
            tell(f"merged into {name}, packed again", packed_logits(again, batch.ids, device))


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 64)
