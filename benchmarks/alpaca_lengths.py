"""Writes rows with Alpaca's length distribution, for measuring packing without a download.

    python -m benchmarks.alpaca_lengths FILE.jsonl [ROWS]     # 52,000 unless said otherwise

A row has 36 + x tokens, x log-normal with median 74 and sigma 0.7, at most 1,304 tokens: a fit to what is published
of the cleaned Alpaca in its prompt template, not to its rows. LitGPT's tutorials (oom.md, prepare_dataset.md) give a
median of 110 tokens and 256 as a length that cuts few rows; here 94% are no longer, and of 52,000 the longest has
about 1,300. With benchmarks.make_checkpoint's tokenizer, of which a token is a byte, rows have exactly these lengths.
The first 36 tokens, but for EOS, are the prompt.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from data.formats import QA

ROWS = 52_000
PROMPT, MEDIAN, SIGMA, LONGEST = 36, 74, 0.7, 1304  # tokens; PROMPT counts BOS and EOS


def lengths(rows: int) -> torch.Tensor:
    """Tokens of each row: [rows] int64, the same in every call."""
    normal = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    answers = (math.log(MEDIAN) + SIGMA * normal).exp().round().long()
    return (PROMPT + answers.clamp(min=1)).clamp(max=LONGEST)


def write_rows(path: Path, rows: int) -> None:
    question = "q" * (PROMPT - 2 - len(QA.format(question="")))
    with path.open("w", encoding="utf-8") as file:
        for length in lengths(rows).tolist():
            row = {"question": question, "answer": "a" * (length - PROMPT)}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else ROWS)
