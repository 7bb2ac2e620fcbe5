"""The widths of each family's decoder layers, which the planner counts activations by."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from models.registry import build_on_meta, read_config
from monitoring.layer_memory import LayerWidths, layer_widths

# A Llama of 64 hidden features, 4 heads of 16, 2 of them for keys, and an MLP of 160.
LLAMA = asdict(LayerWidths(hidden=64, query=64, key=32, mlp=160, heads=4))
WIDE = {"query": 128, "key": 64}  # heads of 32


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("llama", {}),
        ("gemma2", WIDE | {"hidden": 96, "has_four_norms": True, "is_eager": True, "window": 16}),
        ("qwen3", WIDE | {"has_head_norms": True}),
        ("phi3", {"has_fused_qkv": True, "has_fused_gate": True}),
        # Two experts of 48 for each token.
        ("qwen3_moe", WIDE | {"has_head_norms": True, "mlp": 96, "experts_per_token": 2, "compiles": False}),
    ],
)
def test_layer_widths(kind, others, checkpoints):
    config, family = read_config(checkpoints(kind))
    assert asdict(layer_widths(build_on_meta(config, family), family)) == LLAMA | others
