"""A replay whose forward or backward differs from the layer's is found."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from parallel import layer_graphs
from parallel.layer_graphs import CALLS_BEFORE
from parallel.replay_check import are_close
from tests.helpers.layer_graphs import Graphed, Layer

DIFFERS = "--cuda_graphs: a layer differs from the one that is recorded: it runs without graphs"


class Scaled(torch.autograd.Function):
    """x, with a gradient times `factor`."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class Hiding(torch.autograd.Function):
    """x * x; keeps x where no hook for saved tensors sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach().clone()
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.x * gradient


class ScaledLayer(Layer):
    """Its factor is in a list, where `describe_kind` does not see it, and only backward reads it."""

    def __init__(self, factor: float):
        super().__init__()
        self.in_backward = [factor]

    def forward(self, x):
        return Scaled.apply(super().forward(x), self.in_backward[0])


class HidingLayer(Layer):
    def forward(self, x):
        return Hiding.apply(super().forward(x))


@pytest.mark.parametrize(
    ("layers", "replayed"),
    [
        ([ScaledLayer(1.0), ScaledLayer(1.0)], 2),
        ([ScaledLayer(1.0), ScaledLayer(1.2)], 1),
        ([HidingLayer(), HidingLayer()], 0),
    ],
)
def test_a_backward_that_differs_is_not_replayed(layers: list[nn.Module], replayed: int):
    graphed = Graphed(*layers)
    graphed.call(CALLS_BEFORE + 1)
    compared = graphed.replays
    graphed.call()
    assert graphed.replays - compared == 2 * replayed
    assert (DIFFERS in graphed.lines) == (replayed < 2)


def gradients(*values: float) -> list[Tensor | None]:
    return [torch.full((2, 2), value, dtype=torch.bfloat16) for value in values]


@pytest.mark.parametrize(
    ("replayed", "own", "close"),
    [
        (gradients(1, 100), gradients(1, 100), True),
        (gradients(0.98, 103), gradients(1, 100), True),
        (gradients(-0.2, 100), gradients(0.2, 100), True),  # rounding, beside the other
        (gradients(1, 90), gradients(1, 100), False),
        (gradients(2, 100), gradients(1, 100), False),
        (gradients(0, 0), gradients(0, 0), True),
        (gradients(1, 0), gradients(0, 0), False),
        (gradients(1, torch.nan), gradients(1, 1), False),
        (gradients(1, 1), gradients(1, torch.inf), True),
        (gradients(50, 1), gradients(1, torch.inf), False),  # an overflow excuses no other
        ([None, *gradients(1)], [None, *gradients(1)], True),
        ([None, *gradients(1)], [*gradients(1), None], False),
        ([], [], True),
        ([torch.empty(0)], [torch.empty(0)], True),
    ],
)
def test_gradients_may_differ_by_rounding(replayed, own, close):
    assert bool(are_close(replayed, own)) == close


def test_deterministic_gradients_must_be_equal():
    torch.use_deterministic_algorithms(True)
    try:
        assert are_close(gradients(1, torch.nan), gradients(1, torch.nan))
        assert not are_close(gradients(1.01, 100), gradients(1, 100))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_layer_without_memory_for_the_comparison_runs_as_ever():
    graphed = Graphed(Layer())
    error = torch.OutOfMemoryError("CUDA out of memory. Tried ...")
    with mock.patch.object(layer_graphs, "replay_agrees", side_effect=error) as agrees:
        graphed.call(CALLS_BEFORE + 3)
    assert agrees.call_count == 1 and graphed.replays == 0
    assert any("no memory to compare" in line for line in graphed.lines)
