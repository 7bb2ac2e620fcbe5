"""Routed experts: each linear is quantized, and outputs and gradients are transformers' own."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeMLP

import train
from data.batches import Batch
from data.rows import IGNORE
from models.experts import StackedExperts
from models.family import unwrapped_name
from models.moe import Experts
from parallel.shards import full_tensor
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.compiled import CHECKPOINTED, compiled_run
from tests.helpers.logits import IDS
from tests.helpers.parity import PLAIN, arguments, assert_same
from tests.helpers.products import products, slow
from tests.helpers.runs import outputs, set_up, split_members, train_run, transformers_model

ATTENTION = {f"self_attn.{x}_proj" for x in "qkvo"}


def test_every_expert_is_quantized_and_the_router_is_not(checkpoints, alpaca_file, one_rank):
    parameters = one_rank(parameter_names, args_for(checkpoints("qwen3_moe"), alpaca_file, "qlora"))[0]
    packed = {name.removesuffix(".codes") for name in parameters if name.endswith(".codes")}
    projections = [f"{x}_proj" for x in ("gate", "up", "down")]
    expected = {f"model.layers.{i}.{linear}.base" for i in range(3) for linear in ATTENTION}
    expected |= {f"model.layers.0.mlp.{p}" for p in projections}
    expected |= {f"model.layers.{i}.mlp.experts.{stack}" for i in (1, 2) for stack in ("gate_up", "down")}
    assert packed == expected
    assert {n for n in parameters if ".mlp." in n and n.rpartition(".")[0] not in packed} == {
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.gate.weight",
    }


def parameter_names(rank_info, args) -> set[str]:
    return {unwrapped_name(name) for name, _ in set_up(rank_info, args)[1].named_parameters()}


def stacked(experts: Experts) -> dict[str, list[torch.Tensor]]:
    """Stack the experts' parameters as transformers does: [E, 2 I, H] and [E, H, I]."""
    return {
        "gate_up_proj": torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in experts]),
        "down_proj": torch.stack([e.down_proj.weight for e in experts]),
    }


@pytest.fixture
def routed():
    """Return (our module, transformers' with the same weights, arguments of both). Expert 5 gets no token."""
    config = tiny.CONFIGS["qwen3_moe"]()
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    ours = Experts(lambda: Qwen3MoeMLP(config, config.moe_intermediate_size), 8, 2)
    theirs = Qwen3MoeExperts(config)
    theirs.load_state_dict({name: t.detach() for name, t in stacked(ours).items()})
    scores = torch.rand(40, 8, generator=generator)
    scores[:, 5] = 0
    weights, index = scores.topk(2)
    return ours, theirs, (torch.randn(40, 64, generator=generator), index, weights)


def test_experts_are_transformers_own(routed):
    """Compare output, and gradients of inputs, routing weights and experts: the idle one's is 0, not None."""
    ours, theirs, (x, index, weights) = routed
    results = []
    for module in (ours, theirs):
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = module(inputs[0], index, inputs[1])
        y.square().sum().backward()
        results.append([y, *(t.grad for t in inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for name, expected in theirs.named_parameters():
        last = ["gate_proj", "up_proj"] if name == "gate_up_proj" else [name]
        gradient = torch.stack([torch.cat([getattr(e, n).weight.grad for n in last]) for e in ours])
        torch.testing.assert_close(gradient, expected.grad, rtol=1e-5, atol=1e-6)
        assert not gradient[5].any() and gradient[:5].any()


def test_an_idle_expert_runs_only_if_it_is_trained(routed):
    ours, _, arguments = routed
    ran = []
    for i, expert in enumerate(ours):
        expert.register_forward_hook(lambda *_, i=i: ran.append(i))
    ours(*arguments)
    ours.requires_grad_(False)
    ours(*arguments)
    assert ran == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("kind", ["qwen3_moe", *slow(["glm4_moe_lite"])])
def test_gradients_of_trained_experts_are_transformers_own(kind, checkpoints, alpaca_file, two_ranks):
    """Compare all gradients of the full sharded model, router and experts included.

    The reference converts the files' names as transformers does.
    """
    args = args_for(checkpoints(kind), alpaca_file, "full")
    ours, state = two_ranks(gradients, args)[0]
    model = transformers_model(checkpoints(kind), state)
    logits = model(input_ids=IDS).logits
    F.cross_entropy(
        logits.flatten(0, 1), targets().flatten(), ignore_index=IGNORE, reduction="sum"
    ).backward()
    for name, parameter in model.named_parameters():
        layer, _, last = name.rpartition(".")
        if layer.endswith(".experts"):
            parts = ["gate_proj", "up_proj"] if last == "gate_up_proj" else [last]
            found = torch.stack(
                [torch.cat([ours.pop(f"{layer}.{e}.{p}.weight") for p in parts]) for e in range(8)]
            )
        else:
            found = ours.pop(name)
        torch.testing.assert_close(
            found, parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not ours


def targets() -> torch.Tensor:
    return IDS.roll(-1, 1).masked_fill(torch.arange(IDS.shape[1]) == IDS.shape[1] - 1, IGNORE)


def gradients(rank_info, args):
    """Return ({parameter: full gradient}, weights) for the loss of IDS, with one row on each rank."""
    _, state, _ = outputs(rank_info, args, IDS)
    _, model = set_up(rank_info, args)
    rows = slice(rank_info.rank, None, rank_info.world)
    train.loss_sum(model, Batch(IDS[rows], targets()[rows])).backward()
    trained = {unwrapped_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    return split_members(model, {name: full_tensor(p.grad) for name, p in trained.items()}), state


@pytest.mark.parametrize(
    ("kind", "train_type"),
    products(
        *(["qwen3_moe", "glm4_moe_lite"], ["full", "bnb_dora"]),
        always=[("qwen3_moe", "bnb_dora"), ("glm4_moe_lite", "full")],
    ),
)
def test_experts_that_are_idle_on_one_rank(kind, train_type, checkpoints, one_rank, two_ranks, tmp_path):
    """Rows of four tokens reach few of the eight experts, and others on each rank."""
    data = tmp_path / "short.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["ab", "ef"] * 8))
    # SGD: if a gradient is zero except for rounding, AdamW's first steps would have full size.
    args = [*arguments(checkpoints(kind), data, train_type), "--optimizer", "sgd", "--lr", "0.1"]
    plain, _ = one_rank(run_and_experts_used, [*args, "--batch_size", "2"])[0]
    (first, used), (_, used_by_other) = two_ranks(run_and_experts_used, [*args, "--batch_size", "1"])
    assert all(len(experts) < 8 for experts in used + used_by_other) and used != used_by_other
    assert_same(plain, first)


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["full", "lora", "hqq_lora"])
def test_compiled_experts(train_type, checkpoints, even_rows, one_rank):
    """tests/parallel/test_activation_checkpointing.py compiles each family, with DoRA on NF4."""
    args = arguments(checkpoints("qwen3_moe"), even_rows, train_type, "--optimizer", "sgd", "--lr", "0.1")
    plain = one_rank(train_run, [*args, *PLAIN])[0]
    assert_same(plain, one_rank(compiled_run, [*args, *CHECKPOINTED])[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("run", [train_run, compiled_run])
def test_saved_results_of_experts(run, checkpoints, even_rows, one_rank):
    """--activation_budget saves the results of the experts' matmuls, and recomputes the rest."""
    args = arguments(checkpoints("qwen3_moe"), even_rows, "bnb_dora", "--lora_expert_rank", "4")
    args += ["--optimizer", "sgd", "--lr", "0.1"]
    plain = one_rank(train_run, [*args, *PLAIN])[0]
    found = one_rank(run, [*args, *CHECKPOINTED, "--activation_budget", "1"])[0]
    assert_same(plain, found if run is train_run else found[0])


def run_and_experts_used(rank_info, args):
    """Return (train_run's result, the experts with tokens in each forward of a routed layer)."""
    used, original = [], StackedExperts.forward
    StackedExperts.forward = lambda self, x, index, weights: (
        used.append(set(index.unique().tolist())),
        original(self, x, index, weights),
    )[1]
    try:
        return train_run(rank_info, args), used
    finally:
        StackedExperts.forward = original
