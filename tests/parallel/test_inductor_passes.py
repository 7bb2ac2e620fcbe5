"""Rewritten graphs compute the same as the layers.

Here the passes are called as Inductor calls them, on the graphs of a whole run. The graphs are then run
directly, which needs no C++ compiler.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.utils.checkpoint import CheckpointPolicy

import train
from parallel import activation_checkpointing
from parallel.inductor_passes import (
    ADAPTER_BACKWARD,
    CASTS,
    COPIES,
    LINEAR,
    LINEAR_BACKWARD,
    MULTIPLY,
    SUM,
    VIEWS,
    JointGraphPass,
    PartitionedGraphPass,
)
from quantization import operators as linear4bit
from quantization.operator_registry import WITHOUT_GRADIENT
from tests.helpers.compiled import CHECKPOINTED, loss_compiled_with, two_step_args
from tests.helpers.distributed import cache_results
from tests.helpers.parity import PLAIN, arguments, assert_same
from tests.helpers.runs import train_run


def rewritten_run(rank_info, argv: list[str]):
    """(`train_run`'s results, counts of each joint graph, counts of each partitioned graph).

    The first counts are of linears, of matmuls with A's, and of backward's two operators, without dead ones.
    The second are of sums of products that read a gradient that an adapter reads, before and after the pass.
    """
    torch.compiler.reset()
    counted, sums = [], []

    def partition(joint, inputs, **options):
        JointGraphPass()(joint.graph)
        stable_topological_sort(joint.graph)
        joint.graph.eliminate_dead_code()
        linears = joint.graph.find_nodes(op="call_function", target=LINEAR)
        products = {product_of(n.args[8]) for n in linears if n.args[8]}
        count = Counter(n.target for n in joint.graph.nodes)
        if linears:  # a layer's
            counted.append((len(linears), len(products), count[ADAPTER_BACKWARD], count[LINEAR_BACKWARD]))
        return min_cut_rematerialization_partition(joint, inputs, **options)

    def run_directly(module, _):
        before = sums_of_shared(module.graph)
        PartitionedGraphPass()(module.graph)
        sums.append((before, sums_of_shared(module.graph)))
        left = {node.target for node in module.graph.nodes} & set(WITHOUT_GRADIENT)
        assert not left, f"Python is called for the gradients of {left}"
        module.recompile()
        return make_boxed_func(module)

    backend = aot_autograd(
        fw_compiler=run_directly,
        bw_compiler=run_directly,
        partition_fn=partition,
        decompositions=select_decomp_table,
    )
    run = torch.compile(activation_checkpointing.run_layer, fullgraph=True, backend=backend)
    with mock.patch.object(train, "compile_run_layer", lambda cpus: run), loss_compiled_with("aot_eager"):
        return train_run(rank_info, [*argv, "--compile", "true"]), counted, sums


@pytest.fixture(scope="module")
def rewritten(one_rank):
    """rewritten(args) -> the result of `rewritten_run`, computed once for the same arguments."""
    return cache_results(one_rank, rewritten_run)


def sums_of_shared(graph: torch.fx.Graph) -> int:
    """The number of sums of products that read a gradient that an adapter reads."""
    targets = ADAPTER_BACKWARD, WITHOUT_GRADIENT[ADAPTER_BACKWARD]
    adapters = [n for n in graph.nodes if n.target in targets]
    read = {skip_views(x) for n in adapters for x in n.args[0]}
    sums = graph.find_nodes(op="call_function", target=SUM)
    products = [n.args[0] for n in sums if n.args[1] == [0] and n.args[0].target is MULTIPLY]
    return sum(any(skip_views(factor) in read for factor in p.args) for p in products)


def skip_views(node: torch.fx.Node) -> torch.fx.Node:
    while node.target in VIEWS | CASTS | COPIES:
        node = node.args[0]
    return node


def product_of(h: torch.fx.Node) -> torch.fx.Node:
    """The matmul whose result h is, or is a slice of."""
    while h.target is not torch.ops.aten.mm.default:
        h = h.args[0]
    return h


@pytest.mark.parametrize(
    ("train_type", "options", "projections", "operators", "matmuls"),
    [
        ("qlora", "", 4, 4, 4),
        # The scales of down_proj's blocks cannot include its row scales.
        pytest.param("bnb_dora", "", 3, 3, 4, marks=pytest.mark.slow),
        pytest.param("hqq_dora", "--use_gradient_checkpointing false", 3, 3, 4, marks=pytest.mark.slow),
        # k_proj's gradient of x is between theirs.
        pytest.param(
            "qlora", "--lora_target_modules q_proj,v_proj,down_proj", 2, 2, 7, marks=pytest.mark.slow
        ),
        pytest.param("qlora", "--lora_target_modules o_proj,up_proj", 2, 2, 7, marks=pytest.mark.slow),
        # Each gradient of x is cast to fp32, and summed there.
        pytest.param("qlora", "--precision bf16_autocast", 4, 4, 7, marks=pytest.mark.slow),
        pytest.param("qlora", "--lora_dropout 0.1", 7, 7, 7, marks=pytest.mark.slow),
    ],
)
def test_siblings_are_merged(
    train_type, options, projections, operators, matmuls, checkpoints, even_rows, plain_run, rewritten
):
    """A layer's linears share operators, unless dropout gives each linear an x of its own.

    projections: matmuls of x and A's. operators: for the gradients of A's and B's. matmuls: for those of x,
    in a layer whose x has a gradient.
    """
    args = [
        *arguments(checkpoints("llama_bias"), even_rows, train_type, "--batch_size", "4"),
        *options.split(),
    ]
    results, counted, _ = rewritten(args)
    plain = plain_run([*args, "--use_gradient_checkpointing", "false"])
    if "autocast" in options:
        for ours, theirs in ((results[i], plain[i]) for i in (0, 2)):  # losses and norms, in bf16
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=5e-3, atol=0)
    elif "dropout" not in options:
        assert_same(plain, results)
    found = [set(numbers) for numbers in zip(*counted, strict=True)]
    assert found[:3] == [{7}, {projections}, {operators}] and max(found[3]) == matmuls


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "linears"), [("phi3", 4), ("gemma2", 7), ("qwen2", 7), ("gemma3", 7)])
def test_families(kind, linears, checkpoints, one_rank, tmp_path):
    """Biases; fused linears, none of which shares its x; norms after the last ones, which backward reads."""
    args = two_step_args(checkpoints(kind), tmp_path)
    results, counted, _ = one_rank(rewritten_run, [*args, *CHECKPOINTED])[0]
    assert_same(one_rank(train_run, [*args, *PLAIN])[0], results)
    assert {numbers[0] for numbers in counted} == {linears}


@pytest.mark.parametrize(
    ("train_type", "options", "sums"),
    [
        ("bnb_dora", "", {(0, 0), (6, 4)}),  # down_proj's blocks cannot include its row scales
        pytest.param("hqq_dora", "", {(0, 0), (6, 4)}, marks=pytest.mark.slow),
        pytest.param("bnb_dora", "--lora_target_modules up_proj", {(0, 0), (1, 0)}, marks=pytest.mark.slow),
        pytest.param(
            "bnb_dora", "--lora_target_modules v_proj,o_proj", {(0, 0), (2, 2)}, marks=pytest.mark.slow
        ),
        ("qlora", "", {(0, 0)}),
    ],
)
def test_sums_come_before_the_gradients(
    train_type, options, sums, checkpoints, even_rows, plain_run, rewritten
):
    """Only the sums of gate and up move: their gradients are elementwise. Forward has no such sums."""
    args = [
        *arguments(checkpoints("llama_bias"), even_rows, train_type, "--batch_size", "4"),
        *options.split(),
    ]
    results, _, found = rewritten(args)
    assert set(found) == sums
    if not options or "modules" in options:
        assert_same(plain_run([*args, "--use_gradient_checkpointing", "false"]), results)


def test_the_cache_key_includes_the_operators(monkeypatch, tmp_path):
    """Inductor's own key covers a graph's forward computation, not the operators' gradients."""
    changed = tmp_path / "operators.py"
    changed.write_bytes(Path(linear4bit.__file__).read_bytes() + b"#")
    before = JointGraphPass().uuid()
    monkeypatch.setattr(linear4bit, "__file__", str(changed))
    assert JointGraphPass().uuid() != before


def test_backward_has_the_graphs_inputs():
    """Inductor marks a size for recomputation where it rewrites dropout (torch 2.11)."""
    graph = torch.fx.Graph()
    size, x = graph.placeholder("size"), graph.placeholder("x")
    result = graph.call_function(torch.ops.aten.view.default, (x, [size, 4]))
    for node in (size, result):
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    JointGraphPass()(graph)
    assert "recompute" not in size.meta and "recompute" in result.meta
