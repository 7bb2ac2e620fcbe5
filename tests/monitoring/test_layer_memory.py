"""The widths of each family's decoder layers, which the planner counts activations by."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from launch.gpus import find_gpu
from launch.precision import Precision
from models.registry import build_on_meta, read_config
from monitoring.layer_memory import LayerWidths, layer_widths, mask_bytes
from options.train import parse

# A Llama of 64 hidden features, 4 heads of 16, 2 of them for keys, and an MLP of 160.
LLAMA = asdict(LayerWidths(hidden=64, query=64, key=32, mlp=160, heads=4))
WIDE = {"query": 128, "key": 64}  # heads of 32


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("llama", {}),
        *((kind, {}) for kind in ("granite", "smollm3")),
        *((kind, WIDE) for kind in ("ministral3", "seed_oss")),
        *((kind, {"has_head_norms": True}) for kind in ("exaone4_small", "olmo2")),
        *((kind, {"has_head_norms": True, "window": 16}) for kind in ("exaone4", "olmo3")),
        ("gemma2", WIDE | {"hidden": 96, "has_four_norms": True, "is_eager": True, "window": 16}),
        ("qwen3", WIDE | {"has_head_norms": True}),
        ("phi3", {"has_fused_qkv": True, "has_fused_gate": True}),
        ("starcoder2", {"mlp_tensors": 2, "window": 16}),
        ("glm4", WIDE | {"has_four_norms": True, "has_fused_gate": True}),
        ("cohere2", {"has_one_norm": True, "window": 16}),
        ("nemotron", WIDE | {"mlp": 32, "mlp_tensors": 2, "passes_row_bounds": False}),
        ("phi", {"has_one_norm": True}),
        # Two experts of 48 for each token and, in Qwen2-MoE, a shared one of 96.
        ("qwen3_moe", WIDE | {"has_head_norms": True, "mlp": 96, "experts_per_token": 2, "compiles": False}),
        ("mixtral", {"mlp": 96, "experts_per_token": 2, "compiles": False}),
        ("qwen2_moe", {"mlp": 192, "experts_per_token": 2, "compiles": False}),
    ],
)
def test_layer_widths(kind, others, checkpoints):
    config, family = read_config(checkpoints(kind))
    assert asdict(layer_widths(build_on_meta(config, family), family)) == LLAMA | others


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, 0), (0.1, 2 * 100**2 * (1 + 2))])
def test_packed_rows_have_masks_where_scores_are_dropped(dropout, expected, checkpoints):
    """Elsewhere the variable-length kernel needs none."""
    model_config, family = read_config(checkpoints("seed_oss"))
    model_config.attention_dropout = dropout
    widths = layer_widths(build_on_meta(model_config, family), family)
    config, _ = parse(["--model_name", "any", "--packing", "--batch_size", "2"])
    assert (
        mask_bytes(config, Precision(torch.bfloat16, torch.float32), widths, find_gpu("H200"), 100)
        == expected
    )
