"""The rounding errors of the 4-bit layer's matmuls on a GPU (benchmarks/fp8_errors.py)."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fp8_errors import list_blocks, measure
from models.shapes import SHAPES


@pytest.mark.gpu
def test_16_bits_round_far_less_than_nf4():
    for name, (block, shapes) in list_blocks(SHAPES["thin"]).items():
        for row in measure(name, block, shapes, 512, ["16bit"], torch.device("cuda")):
            if row.reference == "dequantized":
                assert all(1e-4 < error < 0.01 for error in row.errors.values()), row
            elif "W" in row.errors:
                assert 0.08 < row.errors["W"] < 0.1, row
