"""CUDA graphs, as far as a CPU has them: a replay calls the function again, into the same tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import train
from parallel.activation_checkpointing import CheckpointedModule, SavedActivations, compile_run_layer
from parallel.fixed_tensors import Copies, Slots
from parallel.layer_graphs import GraphedLayer, LayerGraphs
from tests.helpers.compiled import loss_compiled_with
from tests.helpers.runs import train_run


class RepeatedCalls:
    """GraphMemory's interface. Like a graph, a replay reads and writes the tensors of the recording."""

    retains_graph = True  # each replay of a backward goes through it

    def __init__(self):
        self.n_recorded = self.n_replays = 0
        self.slots = Slots()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        for buffer in self.slots.buffers.values():  # what a recording computes are no values yet
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
        result = function()
        self.n_recorded += 1

        def replay() -> None:
            self.n_replays += 1
            with torch.enable_grad():
                computed = function()
            for fixed, new in zip(tree_leaves(result), tree_leaves(computed), strict=True):
                if isinstance(fixed, torch.Tensor):
                    Copies([fixed]).copy_in([new])

        return result, replay

    def allocating(self) -> contextlib.nullcontext:
        return contextlib.nullcontext()

    def without_owner(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.detach() for tensor in tensors]

    def count_memory(self) -> None:
        pass


class Layer(nn.Module):
    """A linear times a factor that is in a list, where `describe_kind` does not see it."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.linear, self.factor = nn.Linear(4, 4), [factor]

    def forward(self, x, scale=1.0):
        return torch.tanh(self.linear(x)) * self.factor[0] * scale


class Graphed:
    """Layers with graphs, and what was reported."""

    def __init__(self, *layers: nn.Module):
        self.lines: list[str] = []
        memory = RepeatedCalls()
        self.graphs = LayerGraphs(memory, None, self.lines.append)
        memory.slots = self.graphs.slots
        self.layers = [GraphedLayer(CheckpointedModule(x, SavedActivations.ALL), self.graphs) for x in layers]

    @property
    def replays(self) -> int:
        return self.graphs.memory.n_replays

    def call(self, times: int = 1, rows: int = 2, **kwargs) -> None:
        """Call all layers in forward, then in backward, and compare results and gradients with their own."""
        for _ in range(times):
            calls = []
            for layer in self.layers:
                x = torch.randn(rows, 4, requires_grad=True)
                result, expected = layer(x, **kwargs), layer._checkpoint_wrapped_module(x, **kwargs)
                torch.testing.assert_close(result, expected, rtol=0, atol=0)
                calls.append(([x, *layer.parameters()], result, expected))
            for given, result, expected in reversed(calls):
                gradient = torch.randn_like(result)
                got, wanted = (
                    torch.autograd.grad(y, given, gradient, allow_unused=True) for y in (result, expected)
                )
                torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def graphed_run(rank_info, argv: list[str]):
    """Return (`train_run`'s results, graphs recorded, graphs compiled, replays, reported lines), on a CPU."""
    torch.compiler.reset()
    before = counters["stats"]["unique_graphs"]
    lines: list[str] = []
    memory = RepeatedCalls()
    graphs = LayerGraphs(memory, None, lines.append)
    memory.slots = graphs.slots
    with (
        mock.patch.object(train, "compile_run_layer", lambda cpus: compile_run_layer("aot_eager")),
        mock.patch.object(train, "make_layer_graphs", lambda *_: graphs),
        mock.patch.object(torch._functorch.config, "donated_buffer", False),  # each can be used once
        loss_compiled_with("aot_eager"),
    ):
        results = train_run(rank_info, [*argv, "--compile", "true"])
    compiled = counters["stats"]["unique_graphs"] - before
    return results, memory.n_recorded, compiled, memory.n_replays, lines
