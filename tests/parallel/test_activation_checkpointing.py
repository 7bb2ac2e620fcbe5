"""Compilation and activation checkpointing change nothing but speed and memory.

tests/helpers/parity.py explains the tolerances. The compiler's own code generator needs a C++ compiler or a
GPU. The tests here cover what comes before it: tracing whole layers without a break, the graphs of forward
and backward, and recomputation. tests/gpu/test_modes.py has the rest.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import train
from options.methods import METHODS
from parallel import activation_checkpointing, activation_offload
from parallel.activation_budget import ActivationBudget
from parallel.activation_checkpointing import (
    MAX_GRAPHS_PER_KIND,
    CheckpointedModule,
    SavedActivations,
    compile_run_layer,
    raise_graph_limit,
    start_compile_workers,
)
from quantization import operators as linear4bit
from tests.helpers.compiled import CHECKPOINTED, EXTRA_GRAPHS, LAYERS, LINEARS, compiled_run, two_step_args
from tests.helpers.parity import PLAIN, TYPES, arguments, assert_same, biased_checkpoint
from tests.helpers.products import products
from tests.helpers.runs import set_up, train_run
from training import loop_components
from training.bad_steps import BadStepGuard

# Slow: test_compiled has Llama. Two steps of Gemma 3's take 20 s.
FAMILIES = [
    *(("phi3", 2), ("gemma2", 2), ("gemma3", 3), ("qwen2", 2)),
    *(("exaone4", 3), ("granite", 2), ("ministral3", 2), ("olmo2", 2), ("olmo3", 3)),
    *(("seed_oss", 2), ("smollm3", 3)),
    *(("cohere2", 3), ("glm4", 2), ("nemotron", 2), ("phi", 2), ("starcoder2", 2)),
    # In most, the first layer has no experts.
    *(("mixtral", 2), ("qwen2_moe", 2), ("qwen3_moe", 2), ("gpt_oss", 3), ("glm4_moe_lite", 2)),
]


@pytest.mark.parametrize(
    ("train_type", "checkpointing"),
    products(
        TYPES,
        ["true", "false"],
        always=[("full", "false"), ("hqq_llama_pro", "true")],
        # hqq_dora is compiled in test_recomputation, and its graphs are counted in
        # tests/parallel/test_activation_offload.py. bnb_dora and qlora are compiled in
        # tests/parallel/test_inductor_passes.py. The others combine the same parts: LoRA and DoRA as in
        # hqq_dora, dense weights as in full, HQQ and expansion as in hqq_llama_pro.
        left_out=[t for t in TYPES if t not in ("full", "hqq_llama_pro")],
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
    [pytest.param(k, n, marks=pytest.mark.slow) for k, n in FAMILIES],
)
def test_compiled_families(kind, layers, checkpoints, one_rank, tmp_path):
    """Each kind of layer is one graph, and the first layer, whose input has no gradient, another.

    Gemma 2's kinds differ in a mask, which is an argument.
    """
    args = two_step_args(checkpoints(kind), tmp_path)
    results, graphs = one_rank(compiled_run, [*args, *CHECKPOINTED])[0]
    assert_same(one_rank(train_run, [*args, *PLAIN])[0], results)
    assert graphs == layers + EXTRA_GRAPHS


@pytest.mark.slow
def test_other_lengths_of_rows_are_compiled_once_more(checkpoints, short_rows, plain_run, one_rank):
    """The second graph is for any number of tokens: in five steps of other lengths, each is made twice."""
    args = arguments(checkpoints("llama_bias"), short_rows, "lora")
    results, graphs = one_rank(compiled_run, [*args, *PLAIN])[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    assert graphs == 2 * (2 + EXTRA_GRAPHS)


# bnb_dora's layers have everything that qlora's have, and norms.
@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["qlora", "bnb_dora"])
def test_compiled_units_within_layers_in_two_ranks(train_type, checkpoints, even_rows, plain_run, two_ranks):
    args = arguments(checkpoints("llama_bias"), even_rows, train_type)
    options = ["--batch_size", "2", "--wrap_policy", "sublayer", "--use_activation_cpu_offload"]
    results, graphs = two_ranks(compiled_run, [*args, *options])[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    assert graphs


# What the three layers save, by its first letters: (row_length of the budget, number of its upgrades).
UPGRADES = {"III": (63, 0), "IMM": (63, 2), "AAM": (64, 4)}


def counted_run(rank_info, argv: list[str], compiled: bool, levels: str):
    """(`train_run`'s results, the first letters of what the layers save, counts of each step).

    The counts are of dequantized weights, and of tensors sent to the host. levels: a key of UPGRADES.
    """
    counts, original = {"weights": 0, "offloaded": 0}, linear4bit.dequantize
    pack, step = activation_offload.HostActivations.pack, BadStepGuard.step
    budgets, per_step = [], []

    def dequantize(*args, **kwargs):
        counts["weights"] += 1
        return original(*args, **kwargs)

    def counted_pack(self, tensor):
        counts["offloaded"] += 1
        return pack(self, tensor)

    def make_budget(*args, **options):
        row_length, n_upgrades = UPGRADES[levels]
        budget = ActivationBudget(*args, **options | {"row_length": row_length})
        budget._assign(sum(n_bytes for *_, n_bytes in budget.upgrades[:n_upgrades]))
        budgets.append(budget)
        return budget

    def counted_step(self, *rest):
        per_step.append(dict(counts))
        counts.update(weights=0, offloaded=0)
        return step(self, *rest)

    with (
        mock.patch.object(linear4bit, "dequantize", dequantize),
        mock.patch.object(activation_offload.HostActivations, "pack", counted_pack),
        mock.patch.object(activation_offload, "MIN_OFFLOAD_BYTES", 0),
        mock.patch.object(loop_components, "ActivationBudget", make_budget),
        mock.patch.object(BadStepGuard, "step", counted_step),
    ):
        results = compiled_run(rank_info, argv)[0] if compiled else train_run(rank_info, argv)
    return results, "".join(layer.saved.name[0] for layer in budgets[0].layers), per_step[1:]


@pytest.mark.parametrize(
    ("train_type", "compiled", "levels"),
    products(
        ["qlora", "hqq_dora"],
        [False, True],
        list(UPGRADES),
        always=[("qlora", False, "III"), ("qlora", False, "IMM"), ("hqq_dora", True, "AAM")],
    ),
)
def test_recomputation(train_type, compiled, levels, checkpoints, even_rows, plain_run, one_rank):
    """Each weight is dequantized in forward, in backward, in recomputation unless its result was saved, and
    for DoRA's norm. A compiled layer does not recompute the last projection: LoRA does not need it, and
    DoRA's output is on the host. A layer that is not compiled and saves ATTENTION recomputes the norms."""
    args = arguments(checkpoints("llama_bias"), even_rows, train_type)
    results, saved, steps = one_rank(counted_run, [*args, *CHECKPOINTED], compiled, levels)[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    assert saved == levels
    is_dora = METHODS[train_type].adapter == "dora"
    without_matmuls = LAYERS - levels.count("M")
    recomputed = without_matmuls * (LINEARS - compiled)
    if is_dora and not compiled:
        recomputed += levels.count("A") * LINEARS
    # The first layer's input needs no gradient: backward does not use three weights of its attention.
    weights = LAYERS * LINEARS * (3 if is_dora else 2) - 3 + recomputed
    offloaded = without_matmuls if is_dora and compiled else 0
    assert steps == [{"weights": weights, "offloaded": offloaded}] * len(steps)


@pytest.mark.slow
def test_inputs_and_outputs_are_offloaded_from_layers_that_save_attention(
    checkpoints, even_rows, plain_run, one_rank
):
    """The inputs of all layers, and the last outputs of the two layers that do not save MATMULS."""
    args = arguments(checkpoints("llama_bias"), even_rows, "bnb_dora")
    options = [*CHECKPOINTED, "--use_activation_cpu_offload", "true"]
    results, _, steps = one_rank(counted_run, [*args, *options], True, "AAM")[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    assert [step["offloaded"] for step in steps] == [LAYERS + 2] * len(steps)


def test_full_training_saves_matmuls_too(checkpoints, short_rows, plain_run, one_rank):
    args = arguments(checkpoints("llama_bias"), short_rows, "full")
    results = one_rank(train_run, [*args, *CHECKPOINTED, "--activation_budget", "1"])[0]
    assert_same(plain_run([*args, *PLAIN]), results)


# tests/launch/test_precision.py has autocast without compilation.
@pytest.mark.slow
def test_compiled_under_autocast(checkpoints, even_rows, plain_run, one_rank):
    """Biases are fp32 there, and compiled graphs run without autocast."""
    args = arguments(checkpoints("llama_bias"), even_rows, "qlora", "--precision", "bf16_autocast")
    results, _ = one_rank(compiled_run, [*args, *CHECKPOINTED])[0]
    expected = plain_run([*args, *PLAIN])
    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(expected[0]), rtol=1e-2, atol=0)


@pytest.fixture
def fresh_compiler():
    """The compiler and its limits, as in a new process."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=8):
        yield
    torch.compiler.reset()


def all_different(n: int) -> tuple[nn.Module, nn.Module]:
    """(n layers of different widths, the same layers compiled)."""
    plain = nn.Sequential(*[nn.Sequential(nn.Linear(4, 5 + i), nn.Linear(5 + i, 4)) for i in range(n)])
    run = compile_run_layer("aot_eager")
    return plain, nn.Sequential(*[CheckpointedModule(layer, SavedActivations.INPUT, run) for layer in plain])


def gradients(model: nn.Module) -> list[torch.Tensor]:
    x = torch.linspace(0, 1, 12).view(3, 4).requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])


def test_as_many_graphs_as_there_are_kinds_of_layers(fresh_compiler, recwarn, monkeypatch):
    """The number of graphs may exceed torch's limit, and the limit of one kind."""
    monkeypatch.setattr(activation_checkpointing, "MAX_GRAPHS_PER_KIND", 10)
    plain, compiled = all_different(n := 12)
    raise_graph_limit(list(compiled))
    before = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(gradients(compiled), gradients(plain))
    assert counters["stats"]["unique_graphs"] - before == n
    assert not [w for w in recwarn if "compilations" in str(w.message)]


def test_beyond_the_limit_layers_run_uncompiled(fresh_compiler):
    plain, compiled = all_different(12)
    before = counters["stats"]["unique_graphs"]
    with pytest.warns(UserWarning, match="after 8 compilations"):
        torch.testing.assert_close(gradients(compiled), gradients(plain))
    torch.testing.assert_close(gradients(compiled), gradients(plain))
    assert counters["stats"]["unique_graphs"] - before == 8


@pytest.mark.parametrize(("targets", "kinds"), [("all", 1), ("layers.1.mlp.up_proj,q_proj", 2)])
def test_kinds_of_layers_in_a_run(targets, kinds, checkpoints, short_rows, one_rank):
    args = arguments(checkpoints(), short_rows, "qlora", "--lora_target_modules", targets)
    kinds += 1  # the norm after the layers
    assert one_rank(limit_in_a_run, args)[0] == MAX_GRAPHS_PER_KIND * kinds


def limit_in_a_run(rank_info, args) -> int:
    with (
        torch._dynamo.config.patch(recompile_limit=8),
        mock.patch.object(train, "compile_run_layer", lambda cpus: compile_run_layer("aot_eager")),
    ):
        set_up(rank_info, [*args, "--compile", "true"])
        return torch._dynamo.config.recompile_limit


def test_compile_workers_are_the_ranks_share_of_the_cpus(monkeypatch):
    """Unless the user asks for another number."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    started = []
    monkeypatch.setattr(AsyncCompile, "warm_pool", lambda: started.append(config.compile_threads))
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    for cpus in (64, 3):
        monkeypatch.setattr(config, "compile_threads", 32)
        start_compile_workers(cpus)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "8")
    monkeypatch.setattr(config, "compile_threads", 8)
    start_compile_workers(3)
    assert started == [32, 3, 8]
