"""Checkpoints with random weights: those of GPT-OSS are stacked in MXFP4, as the hub's files are."""

from __future__ import annotations

import pytest

from benchmarks.make_checkpoint import STD, make_checkpoint
from models.shapes import SHAPES, GptOssShape, Shape
from options.errors import UserError
from tests.helpers.auto_classes import load_transformers_model


def test_gpt_oss_is_stacked_in_mxfp4(tmp_path, monkeypatch):
    """transformers reads it, and its experts have the spread that all weights have."""
    shape = GptOssShape(Shape(64, 32, 2, 4, 2, 300, 8192), 16, 4)
    monkeypatch.setitem(SHAPES, "tiny-oss", shape)
    make_checkpoint(tmp_path / "model", "tiny-oss")
    model = load_transformers_model(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) == shape.parameters()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            assert weight.float().std().item() == pytest.approx(STD, rel=0.25), name
    with pytest.raises(UserError, match=r"^tiny-oss: its stacks of experts cannot be left empty$"):
        make_checkpoint(tmp_path / "empty", "tiny-oss", empty=True)
