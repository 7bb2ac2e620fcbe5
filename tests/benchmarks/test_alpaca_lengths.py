from __future__ import annotations

import torch

from benchmarks.alpaca_lengths import draw_lengths, write_rows
from benchmarks.make_checkpoint import byte_tokenizer
from data.reading import ReadingOptions
from data.tokenizing import tokenize_dataset


def test_rows_have_the_lengths_that_were_drawn(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 500)
    rows = tokenize_dataset(
        str(tmp_path / "rows.jsonl"), ReadingOptions(byte_tokenizer(), context_length=2048)
    )
    assert rows.dropped == rows.cut == 0
    assert torch.equal(rows.lengths(), draw_lengths(500))
    assert torch.equal(rows.targets(), draw_lengths(500) - 35)  # the answer and EOS


def test_they_are_as_the_docstring_says():
    drawn = draw_lengths(52_000)
    assert 109 <= drawn.median() <= 111
    assert 0.93 < (drawn <= 256).float().mean() < 0.95
    assert 1200 <= drawn.max() <= 1304
