"""Measure what merging into each base costs, as the loss on the run's data.

    python -m benchmarks.merge_bases RUN [ROWS]

Compares the trained model, export.py's result with either --base, and those results quantized again to 4
bits. ROWS: rows of the data, from the first (64). The run's data must be a local file or a recipe of one.
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
from data.reading import ReadingOptions
from data.rows import IGNORE
from data.tokenizing import tokenize_dataset
from files.model_folder import CheckpointFiles
from finished.finished_run import load_tokenizer, open_run, read_adapter
from finished.layerwise import LogitInputs, packed_logits, plain_logits, trained_logits


def measure(folder: str, n_rows: int) -> None:
    """Print the loss of the RUN's model and of merged ones, and how far their logits are from the RUN's."""
    run = open_run(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = ReadingOptions.from_config(run.config, load_tokenizer(run))
    rows = tokenize_dataset(run.config.dataset, dataclasses.replace(options, samples=n_rows))
    batch = next(StepSampler(rows, len(rows), 1, 0, 1, 0).steps(1)).batches[0]

    def print_line(name: str, logits: torch.Tensor) -> None:
        """Print one model's loss and its difference from the trained logits."""
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE).item()
        learned = batch.targets != IGNORE
        differences = (logits - trained)[learned].abs()
        print(
            f"{name:38} loss {loss:.4f}, logits differ by up to {differences.max().item():.4f}, on average"
            f" {differences.mean().item():.4f}"
        )

    inputs = LogitInputs(batch.ids, None, torch.arange(batch.ids.shape[1]))
    trained = trained_logits(run, read_adapter(run), inputs, device)
    print_line("trained", trained)
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("dequantized", "original"):
            out = Path(scratch, name)
            options = ["--to", "merged", "--out", str(out), "--base", name, "--check", "false"]
            assert export.main([folder, *options]) == 0
            files = CheckpointFiles(out)
            print_line(
                f"merged into {name}", plain_logits(run.model_config, run.family, files, inputs, device)
            )
            merged_run = dataclasses.replace(run, files=files)
            print_line(f"merged into {name}, packed again", packed_logits(merged_run, inputs, device))


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 64)
