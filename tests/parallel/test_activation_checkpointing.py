"""Compiled layers, and what layers keep for backward, change nothing but speed and memory; tolerances:
tests/helpers/parity.py, which says why.

The compiler's own code generator needs a C++ compiler or a GPU; here all comes before it: tracing whole layers
without a break, the graphs of forward and backward, and what is run again. tests/gpu/test_modes.py has the rest.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import train
from options.methods import METHODS
from parallel import activation_checkpointing as recompute
from parallel import activation_offload
from parallel.activation_checkpointing import (
    GRAPHS,
    ActivationBudget,
    Keep,
    Recomputed,
    allow_graphs,
    compiler,
)
from quantization import operators as linear4bit
from tests.helpers.compiled import CHECKPOINTED, EXTRA_GRAPHS, LAYERS, LINEARS, compiled_run, two_step_args
from tests.helpers.parity import PLAIN, TYPES, arguments, assert_same, biased_checkpoint
from tests.helpers.products import products
from tests.helpers.runs import set_up, train_run
from training import companions
from training.bad_steps import BadSteps

SLOW_FAMILIES = [("gemma2", 2), ("gemma3", 3), ("qwen2", 2)]  # two steps of Gemma 3's take 20 s


@pytest.mark.parametrize(
    ("train_type", "checkpointing"),
    products(
        TYPES,
        ["true", "false"],
        always=[("full", "false"), ("lora", "true"), ("bnb_dora", "true"), ("hqq_llama_pro", "true")],
        # hqq_dora is compiled in test_what_is_computed_again, qlora in tests/parallel/test_inductor_passes.py. The others are of the same
        # parts: DoRA as in bnb_dora, dense weights as in lora, HQQ's and expanded models as in hqq_llama_pro.
        left_out=["dora", "qlora", "hqq_lora", "hqq_dora", "llama_pro", "bnb_llama_pro"],
    ),
)
def test_compiled(train_type, checkpointing, checkpoints, even_rows, plain_run, one_rank):
    args = arguments(checkpoints(biased_checkpoint(train_type)), even_rows, train_type)
    options = ["--batch_size", "4", "--use_gradient_checkpointing", checkpointing]
    results, graphs = one_rank(compiled_run, [*args, *options])[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    # One for each kind of layer, with and without a gradient for its input.
    kinds = 4 if METHODS[train_type].expansion else {"full": 1}.get(train_type, 2)
    assert graphs == kinds + EXTRA_GRAPHS


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("phi3", 2), *(pytest.param(k, n, marks=pytest.mark.slow) for k, n in SLOW_FAMILIES)],
)
def test_compiled_families(kind, layers, checkpoints, one_rank, tmp_path):
    """A graph for each kind of layer, and one for the first, whose input has no gradient. Gemma 2's kinds differ in a
    mask, which they are given."""
    args = two_step_args(checkpoints(kind), tmp_path)
    results, graphs = one_rank(compiled_run, [*args, *CHECKPOINTED])[0]
    assert_same(one_rank(train_run, [*args, *PLAIN])[0], results)
    assert graphs == layers + EXTRA_GRAPHS


@pytest.mark.slow
def test_other_lengths_of_rows_are_compiled_once_more(checkpoints, short_rows, plain_run, one_rank):
    """Then for any number of tokens: in five steps, which have different ones, each graph is made twice."""
    args = arguments(checkpoints("llama_bias"), short_rows, "lora")
    results, graphs = one_rank(compiled_run, [*args, *PLAIN])[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    assert graphs == 2 * (2 + EXTRA_GRAPHS)


# bnb_dora's layers have all of qlora's in them, and its norms.
@pytest.mark.parametrize(
    "train_type", products(["qlora", "bnb_dora"], always=[("bnb_dora",)], left_out=["qlora"])
)
def test_compiled_units_within_layers_in_two_ranks(train_type, checkpoints, even_rows, plain_run, two_ranks):
    args = arguments(checkpoints("llama_bias"), even_rows, train_type)
    options = ["--batch_size", "2", "--wrap_policy", "sublayer", "--use_activation_cpu_offload"]
    results, graphs = two_ranks(compiled_run, [*args, *options])[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    assert graphs


def counted_run(place, argv: list[str], compiled: bool, keeping: int):
    """(`train_run`'s results, degrees of the layers, weights dequantized in each step, tensors sent to the host in
    each step). keeping: layers that keep their results."""
    counts, original = {"weights": 0, "stashed": 0}, linear4bit.dequantize
    pack, step = activation_offload.HostStash.pack, BadSteps.step
    budgets, per_step = [], []

    def dequantize(*args, **kwargs):
        counts["weights"] += 1
        return original(*args, **kwargs)

    def stash(self, tensor):
        counts["stashed"] += 1
        return pack(self, tensor)

    def spending(*args, **options):
        budget = ActivationBudget(*args, **options)
        budget._spend(sum(budget.bytes[LAYERS - keeping :]) + 1)
        budgets.append(budget)
        return budget

    def stepped(self, *rest):
        per_step.append(dict(counts))
        counts.update(weights=0, stashed=0)
        return step(self, *rest)

    with (
        mock.patch.object(linear4bit, "dequantize", dequantize),
        mock.patch.object(activation_offload.HostStash, "pack", stash),
        mock.patch.object(activation_offload, "SMALLEST", 0),
        mock.patch.object(companions, "ActivationBudget", spending),
        mock.patch.object(BadSteps, "step", stepped),
    ):
        results = compiled_run(place, argv)[0] if compiled else train_run(place, argv)
    return results, [layer.keep for layer in budgets[0].layers], per_step[1:]


@pytest.mark.parametrize(
    ("train_type", "compiled", "keeping"),
    products(
        ["qlora", "hqq_dora"],
        [False, True],
        [0, 2],
        always=[("qlora", False, 0), ("hqq_dora", True, 2)],
    ),
)
def test_what_is_computed_again(train_type, compiled, keeping, checkpoints, even_rows, plain_run, one_rank):
    """Each weight is dequantized in forward and in backward, for its recomputation where its result was not kept, and
    for DoRA's norm. What only a compiled layer knows: nothing needs LoRA's last projection again; DoRA's is on the
    host."""
    args = arguments(checkpoints("llama_bias"), even_rows, train_type)
    results, kept, steps = one_rank(counted_run, [*args, *CHECKPOINTED], compiled, keeping)[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    assert kept == [Keep.NOTHING] * (LAYERS - keeping) + [Keep.RESULTS] * keeping
    dora = METHODS[train_type].adapter == "dora"
    again = (LAYERS - keeping) * (LINEARS - compiled)
    # The first layer's input needs no gradient: three weights of its attention are not wanted in backward.
    weights = LAYERS * LINEARS * (3 if dora else 2) - 3 + again
    stashed = LAYERS - keeping if dora and compiled else 0
    assert steps == [{"weights": weights, "stashed": stashed}] * len(steps)


def test_full_training_keeps_results_too(checkpoints, short_rows, plain_run, one_rank):
    args = arguments(checkpoints("llama_bias"), short_rows, "full")
    results = one_rank(train_run, [*args, *CHECKPOINTED, "--activation_budget", "1"])[0]
    assert_same(plain_run([*args, *PLAIN]), results)


def test_compiled_under_autocast(checkpoints, even_rows, plain_run, one_rank):
    """Biases are fp32 there, and compiled graphs run without autocast."""
    args = arguments(checkpoints("llama_bias"), even_rows, "qlora", "--precision", "bf16_autocast")
    results, _ = one_rank(compiled_run, [*args, *CHECKPOINTED])[0]
    expected = plain_run([*args, *PLAIN])
    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(expected[0]), rtol=1e-2, atol=0)


@pytest.fixture
def as_imported():
    """The compiler and its limits as in a fresh process."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=8):
        yield
    torch.compiler.reset()


def all_different(n: int) -> tuple[nn.Module, nn.Module]:
    """(n layers of different widths, the same layers compiled)."""
    plain = nn.Sequential(*[nn.Sequential(nn.Linear(4, 5 + i), nn.Linear(5 + i, 4)) for i in range(n)])
    run = compiler("aot_eager")
    return plain, nn.Sequential(*[Recomputed(layer, Keep.NOTHING, run) for layer in plain])


def gradients(model: nn.Module) -> list[torch.Tensor]:
    x = torch.linspace(0, 1, 12).view(3, 4).requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])


def test_as_many_graphs_as_there_are_kinds_of_layers(as_imported, recwarn, monkeypatch):
    """More than torch's limit, and than what one kind may have."""
    monkeypatch.setattr(recompute, "GRAPHS", 10)
    plain, compiled = all_different(n := 12)
    allow_graphs(list(compiled))
    before = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(gradients(compiled), gradients(plain))
    assert counters["stats"]["unique_graphs"] - before == n
    assert not [w for w in recwarn if "compilations" in str(w.message)]


def test_beyond_the_limit_layers_run_as_they_are(as_imported):
    plain, compiled = all_different(12)
    before = counters["stats"]["unique_graphs"]
    with pytest.warns(UserWarning, match="after 8 compilations"):
        torch.testing.assert_close(gradients(compiled), gradients(plain))
    torch.testing.assert_close(gradients(compiled), gradients(plain))
    assert counters["stats"]["unique_graphs"] - before == 8


@pytest.mark.parametrize(("targets", "kinds"), [("all", 1), ("layers.1.mlp.up_proj,q_proj", 2)])
def test_kinds_of_layers_in_a_run(targets, kinds, checkpoints, short_rows, one_rank):
    args = arguments(checkpoints(), short_rows, "qlora", "--lora_target_modules", targets)
    assert one_rank(limit_in_a_run, args)[0] == GRAPHS * (kinds + 1)  # the norm after the layers is one


def limit_in_a_run(place, args) -> int:
    with (
        torch._dynamo.config.patch(recompile_limit=8),
        mock.patch.object(train, "compiler", lambda: compiler("aot_eager")),
    ):
        set_up(place, [*args, "--compile", "true"])
        return torch._dynamo.config.recompile_limit
