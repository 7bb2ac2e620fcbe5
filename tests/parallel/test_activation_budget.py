"""Which layers save the results of attention and matmuls, and what backward then recomputes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.registry import build_on_meta, read_config
from parallel.activation_budget import ActivationBudget
from parallel.activation_checkpointing import ATTENTION as OPERATORS
from parallel.activation_checkpointing import CheckpointedModule, SavedActivations

TOKENS = 100
# Bytes that a layer of the tiny Llama saves for a token, in bf16. ATTENTION: the result of attention, and the
# softmax's sums of 4 heads. MATMULS: also the results of query, key, value, output, gate, up and down.
ATTENTION = 2 * 64 + 4 * 4
MATMULS = ATTENTION + 2 * (64 + 32 + 32 + 64 + 160 + 160 + 64)


def make_budget(folder, row_length: float, token_bytes: int = 0) -> ActivationBudget:
    """The budget of a model on meta, of so many bytes for each token."""
    config, family = read_config(folder)
    model = build_on_meta(config, family)
    layers = family.decoder_layers(model)
    for i, layer in enumerate(layers):
        layers[i] = CheckpointedModule(layer, SavedActivations.INPUT)
    gib = token_bytes * TOKENS / 2**30
    sizes = {"tokens": TOKENS, "row_length": row_length, "itemsize": 2}
    return ActivationBudget(model, family, torch.device("cpu"), gib=gib, **sizes)


@pytest.mark.parametrize(
    ("row_length", "token_bytes", "levels"),
    [
        (64, ATTENTION - 1, "III"),
        (64, 2 * ATTENTION, "IAA"),
        (64, 2 * ATTENTION + MATMULS - 1, "AAA"),
        (64, 2 * ATTENTION + MATMULS, "AAM"),
        (64, 3 * MATMULS, "MMM"),
        (63, MATMULS - 1, "III"),
        (63, 3 * MATMULS - 1, "IMM"),
    ],
)
def test_attention_comes_first_where_rows_are_as_long_as_the_model_is_wide(
    row_length, token_bytes, levels, checkpoints
):
    budget = make_budget(checkpoints(), row_length, token_bytes)
    assert "".join(layer.saved.name[0] for layer in budget.layers) == levels


@pytest.mark.parametrize(
    ("kind", "indices"), [("gemma3", {1}), ("gemma2", set())], ids=["sliding window", "eager attention"]
)
def test_layers_whose_attention_costs_little_or_cannot_be_saved(kind, indices, checkpoints):
    """Windows have 16 tokens, and two of three layers of Gemma 3 have one."""
    budget = make_budget(checkpoints(kind), 1000)
    saving = [layer for layer, saved, _ in budget.upgrades if saved is SavedActivations.ATTENTION]
    assert {budget.layers.index(layer) for layer in saving} == indices
    matmuls = [layer for layer, saved, _ in budget.upgrades if saved is SavedActivations.MATMULS]
    assert matmuls == budget.layers[::-1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


class ForwardOperators(TorchDispatchMode):
    """A context that counts the linears and the attention operators of forward that it sees."""

    def __init__(self):
        super().__init__()
        self.linears = self.attention = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.linears += func is torch.ops.aten.addmm.default
        self.attention += func in OPERATORS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("saved", "linears", "attention"), [("INPUT", 1, 1), ("ATTENTION", 1, 0), ("MATMULS", 0, 0)]
)
def test_what_backward_recomputes(saved, linears, attention):
    """Nothing in backward needs the result of the last linear: recomputation ends before it."""
    torch.manual_seed(0)
    plain, x = Attention(), torch.randn(2, 5, 8, requires_grad=True)
    inputs = [x, *plain.parameters()]
    expected = torch.autograd.grad(plain(x).square().sum(), inputs)
    with ForwardOperators() as forward:
        loss = CheckpointedModule(plain, SavedActivations[saved])(x).square().sum()
    with ForwardOperators() as backward:
        gradients = torch.autograd.grad(loss, inputs)
    assert (forward.linears, forward.attention) == (2, 1)
    assert (backward.linears, backward.attention) == (linears, attention)
    torch.testing.assert_close(gradients, expected)
