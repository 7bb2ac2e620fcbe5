"""Rewritten graphs compute what the layers compute. The rewriting is Inductor's hook; here it is called as Inductor calls
it, on the graphs of a whole run, which are then run as they are: that needs no C++ compiler."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.utils.checkpoint import CheckpointPolicy

import recompute
import train
from inductor_passes import ADAPTER_BACKWARD, LINEAR, LINEAR_BACKWARD, LayerGraphs
from tests.runs import train_run
from tests.test_parity import arguments, assert_same

OPERATORS = LINEAR, ADAPTER_BACKWARD, LINEAR_BACKWARD


def rewritten_run(place, argv: list[str]):
    """(`train_run`'s results, how many of each of OPERATORS each joint graph has, dead ones not counted)."""
    torch.compiler.reset()
    counted = []

    def partition(joint, inputs, **options):
        LayerGraphs()(joint.graph)
        stable_topological_sort(joint.graph)
        joint.graph.eliminate_dead_code()
        counted.append(Counter(n.target for n in joint.graph.nodes if n.target in OPERATORS))
        return min_cut_rematerialization_partition(joint, inputs, **options)

    as_it_is = make_boxed_func
    backend = aot_autograd(
        fw_compiler=lambda graph, _: as_it_is(graph),
        bw_compiler=lambda graph, _: as_it_is(graph),
        partition_fn=partition,
        decompositions=select_decomp_table,
    )
    run = torch.compile(recompute._run, fullgraph=True, backend=backend)
    with mock.patch.object(train, "compiler", lambda: run):
        results = train_run(place, [*argv, "--compile", "true"])
    return results, [[count[operator] for operator in OPERATORS] for count in counted]


@pytest.mark.parametrize(
    ("train_type", "options", "operators", "matmuls"),
    [
        ("qlora", [], 4, 4),
        ("bnb_dora", [], 3, 4),  # the scales of down_proj's blocks cannot carry those of its rows
        ("hqq_dora", ["--use_gradient_checkpointing", "false"], 3, 4),
        (
            "qlora",
            ["--lora_target_modules", "q_proj,v_proj,down_proj"],
            2,
            7,
        ),  # k_proj's stands between theirs
        ("qlora", ["--lora_target_modules", "o_proj,up_proj"], 2, 7),
        ("qlora", ["--lora_dropout", "0.1"], 7, 7),
    ],
)
def test_siblings_are_joined(
    train_type, options, operators, matmuls, checkpoints, alpaca_file, plain_run, one_rank
):
    """operators: of the gradients of A and B; matmuls: of those of x, in a layer whose x has one. What dropout has gone
    over each linear has for itself."""
    args = [*arguments(checkpoints("llama_bias"), alpaca_file, train_type, "--batch_size", "4"), *options]
    results, counted = one_rank(rewritten_run, args)[0]
    if "--lora_dropout" not in options:
        assert_same(plain_run([*args, "--use_gradient_checkpointing", "false"]), results)
    linears, gradients, of_x = zip(*counted, strict=True)
    assert set(linears) == {7} and set(gradients) == {operators} and max(of_x) == matmuls


def test_backward_has_the_graphs_inputs():
    """A size that was marked to be computed again, as Inductor does where it rewrites dropout (torch 2.11)."""
    graph = torch.fx.Graph()
    size, x = graph.placeholder("size"), graph.placeholder("x")
    result = graph.call_function(torch.ops.aten.view.default, (x, [size, 4]))
    for node in (size, result):
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    LayerGraphs()(graph)
    assert "recompute" not in size.meta and "recompute" in result.meta
