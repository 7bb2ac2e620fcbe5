"""Write rows with Alpaca's length distribution, to measure packing without a download.

    python -m benchmarks.alpaca_lengths FILE.jsonl [ROWS]     # default: 52,000

A row has 36 + x tokens, x log-normal with median 74 and sigma 0.7, at most 1,304 tokens. This fits what is
published about the cleaned Alpaca in its prompt template, not its rows: LitGPT's tutorials (oom.md,
prepare_dataset.md) give a median of 110 tokens, and 256 as a length that cuts few rows. Here 94% of the rows
have at most 256 tokens, and the longest of 52,000 has about 1,300.

Rows have exactly these lengths with benchmarks.make_checkpoint's tokenizer, whose tokens are bytes. The first
36 tokens, without EOS, are the prompt.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from data.formats import QA

ROWS = 52_000
PROMPT_TOKENS, MEDIAN_TOKENS, SIGMA, MAX_TOKENS = 36, 74, 0.7, 1304  # PROMPT_TOKENS counts BOS and EOS


def draw_lengths(rows: int) -> torch.Tensor:
    """Draw the number of tokens of each row, spread like Alpaca's: [rows] int64, the same in every call."""
    normal = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    answers = (math.log(MEDIAN_TOKENS) + SIGMA * normal).exp().round().long()
    return (PROMPT_TOKENS + answers.clamp(min=1)).clamp(max=MAX_TOKENS)


def write_rows(path: Path, rows: int) -> None:
    """Write `rows` questions and answers, of the lengths of `draw_lengths`, as a .jsonl file."""
    question = "q" * (PROMPT_TOKENS - 2 - len(QA.format(question="")))
    with path.open("w", encoding="utf-8") as file:
        for length in draw_lengths(rows).tolist():
            row = {"question": question, "answer": "a" * (length - PROMPT_TOKENS)}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else ROWS)
