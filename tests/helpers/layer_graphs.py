"""CUDA graphs, as far as a CPU has them: a replay calls the function again, into the same tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import train
from parallel.activation_checkpointing import compile_run_layer
from parallel.layer_graphs import LayerGraphs
from tests.helpers.compiled import loss_compiled_with
from tests.helpers.runs import train_run


class RepeatedCalls:
    """GraphMemory's interface. Like a graph, a replay reads and writes the tensors of the recording."""

    retains_graph = True  # each replay of a backward goes through it

    def __init__(self):
        self.n_recorded = self.n_replays = 0

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        result = function()
        self.n_recorded += 1

        def replay() -> None:
            self.n_replays += 1
            with torch.enable_grad():
                computed = function()
            for fixed, new in zip(tree_leaves(result), tree_leaves(computed), strict=True):
                if isinstance(fixed, torch.Tensor):
                    fixed.data.copy_(new.detach())

        tree_leaves(result)[0].detach().fill_(torch.nan)  # a recorded kernel has not run yet
        return result, replay

    def allocating(self) -> contextlib.nullcontext:
        return contextlib.nullcontext()


def graphed_run(rank_info, argv: list[str]):
    """Return (`train_run`'s results, graphs recorded, graphs compiled, replays, reported lines), on a CPU."""
    torch.compiler.reset()
    before = counters["stats"]["unique_graphs"]
    lines: list[str] = []
    memory = RepeatedCalls()
    graphs = LayerGraphs(memory, None, lines.append)
    with (
        mock.patch.object(train, "compile_run_layer", lambda cpus: compile_run_layer("aot_eager")),
        mock.patch.object(train, "make_layer_graphs", lambda *_: graphs),
        mock.patch.object(torch._functorch.config, "donated_buffer", False),  # each can be used once
        loss_compiled_with("aot_eager"),
    ):
        results = train_run(rank_info, [*argv, "--compile", "true"])
    compiled = counters["stats"]["unique_graphs"] - before
    return results, memory.n_recorded, compiled, memory.n_replays, lines
