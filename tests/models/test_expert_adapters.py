"""LoRA and DoRA on routed experts: the equation, PEFT's form of it, and runs with them."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import export
from models.expert_adapters import find_stacked_vectors
from models.qwen3_moe import FAMILY
from options.errors import UserError
from options.train import parse
from parallel.activation_budget import _saved_elements
from parallel.activation_checkpointing import MATMULS
from parallel.optimizers import make_optimizer
from quantization.nf4 import NF4
from tests.helpers.adapters import args_for
from tests.helpers.bnb_checkpoints import make_single_rank_job
from tests.helpers.compiled import CHECKPOINTED, compiled_run
from tests.helpers.finished_runs import write_random_run
from tests.helpers.logits import IDS, transformers_logits
from tests.helpers.parity import PLAIN, arguments, assert_same
from tests.helpers.runs import set_up, train_run
from tests.helpers.stacked_experts import (
    ROUTINGS,
    SCALING,
    H,
    K,
    add_adapters,
    make_list,
    make_routing,
    run_experts,
    stack_like,
)

EXPERT_RANK = ["--lora_expert_rank", "4"]


def reference(experts: nn.Module, x, index, weights) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return `run_experts` and {parameter: gradient} in float64, by the equation, an expert at a time."""
    trained = {
        name: p.detach().double().requires_grad_()
        for name, p in experts.named_parameters()
        if p.requires_grad
    }
    inputs = [x.double().requires_grad_(), weights.double().requires_grad_()]

    def merged(stack: str, expert: int) -> torch.Tensor:
        module = getattr(experts, stack)
        weight = module.base.members().double().view(len(experts), -1, module.base.in_features)[expert]
        a, b = trained[f"{stack}.lora_A"][expert], trained[f"{stack}.lora_B"][expert]
        full = weight + SCALING * b @ a
        if f"{stack}.magnitude_change" not in trained:
            return full
        magnitude = weight.norm(dim=1) + trained[f"{stack}.magnitude_change"][expert]
        return magnitude[:, None] * full / full.norm(dim=1, keepdim=True).detach()

    def bias(stack: str, expert: int) -> torch.Tensor | float:
        biases = getattr(experts, stack).base.bias
        return 0.0 if biases is None else biases.double()[expert]

    rows = []
    for token, chosen in enumerate(index.tolist()):
        total: torch.Tensor | float = 0.0
        for k, expert in enumerate(chosen):
            gate, up = (merged("gate_up", expert) @ inputs[0][token] + bias("gate_up", expert)).chunk(2)
            result = merged("down", expert) @ experts.product(gate, up) + bias("down", expert)
            total = total + inputs[1][token, k] * result
        rows.append(total)
    y = torch.stack(rows)  # type: ignore[arg-type]
    y.square().sum().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
    return [y.detach(), *(t.grad for t in inputs)], gradients


@pytest.mark.parametrize("case", ROUTINGS)
@pytest.mark.parametrize("quantizer", [None, NF4()], ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_equation(kind, quantizer, case):
    """Results, and gradients of inputs, A, B and magnitudes, in float64; those of an idle expert are 0."""
    experts = add_adapters(kind, make_list(), quantizer)
    arguments = make_routing(case, tokens=12)
    found = run_experts(experts, *arguments)
    expected, gradients = reference(experts, *arguments)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    trained = {n: p for n, p in experts.named_parameters() if p.requires_grad}
    assert len(trained) == (6 if kind == "dora" else 4) and trained.keys() == gradients.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad.double(), gradients[name], rtol=1e-4, atol=1e-4)


def test_values_at_the_start():
    """A is Kaiming-uniform, as PEFT's of [E R, I]; B and the changes of magnitudes are zeros."""
    module = add_adapters("dora", make_list()).gate_up
    values = module.initial_values(torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(module.base.in_features)
    assert values["lora_A"].abs().max() <= bound and values["lora_A"].std() > bound / 2
    assert not values["lora_B"].any() and not values["magnitude_change"].any()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_biases_are_not_rescaled(kind):
    """GPT-OSS's experts."""
    experts = add_adapters(kind, make_list(biased=True), NF4())
    arguments = make_routing("random", tokens=12)
    found = run_experts(experts, *arguments)
    for a, b in zip(found, reference(experts, *arguments)[0], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_peft_loads_the_adapter(kind, checkpoints, alpaca_file, one_rank, tmp_path):
    """PEFT's model over transformers' has our logits. Ranks of experts and linears differ."""
    run = tmp_path / "run"
    args = args_for(checkpoints(kind), alpaca_file, "lora", *EXPERT_RANK)
    logits = write_random_run(one_rank, run, args)
    base = AutoModelForCausalLM.from_pretrained(checkpoints(kind), dtype=torch.float32)
    without = base(input_ids=IDS).logits.detach()
    model = peft.PeftModel.from_pretrained(base, run)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    assert (found - without).abs().max() > 0.1
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("train_type", "base"),
    [
        ("bnb_dora", "dequantized"),
        ("lora", "original"),
        *(
            pytest.param(t, b, marks=pytest.mark.slow)
            for t, b in [("hqq_lora", "dequantized"), ("dora", "original")]
        ),
    ],
)
@pytest.mark.parametrize("kind", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_the_merged_model(kind, train_type, base, checkpoints, alpaca_file, one_rank, tmp_path):
    run, out = tmp_path / "run", tmp_path / "merged"
    args = args_for(checkpoints(kind), alpaca_file, train_type, *EXPERT_RANK)
    logits = write_random_run(one_rank, run, args)
    options = ["--to", "merged", "--base", base, "--out", str(out), "--dtype", "float32"]
    assert export.main([str(run), *options]) == 0
    torch.testing.assert_close(transformers_logits(out), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train_type", ["qlora", pytest.param("bnb_dora", marks=pytest.mark.slow)])
def test_two_ranks_and_checkpointing_change_nothing(
    train_type, checkpoints, alpaca_file, one_rank, two_ranks
):
    args = arguments(checkpoints("qwen3_moe"), alpaca_file, train_type, *EXPERT_RANK)
    one = one_rank(train_run, [*args, *PLAIN])[0]
    assert any(".experts.gate_up.lora_B" in name for name in one[1])
    assert_same(one, two_ranks(train_run, [*args, "--batch_size", "2"])[0])


@pytest.mark.slow
def test_compiled_layers_with_adapters_on_experts(checkpoints, even_rows, one_rank):
    for train_type in ("bnb_dora", "lora"):
        args = arguments(checkpoints("qwen3_moe"), even_rows, train_type, *EXPERT_RANK)
        plain = one_rank(train_run, [*args, *PLAIN])[0]
        assert_same(plain, one_rank(compiled_run, [*args, *CHECKPOINTED])[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["qlora", "bnb_dora"])
def test_an_adapter_is_trained_further(train_type, checkpoints, alpaca_file, one_rank, tmp_path):
    """With --adapter the run starts with the logits of the other one, and takes its expert rank."""
    run = tmp_path / "run"
    args = args_for(checkpoints("qwen3_moe"), alpaca_file, train_type, *EXPERT_RANK)
    logits = write_random_run(one_rank, run, args)
    more = ["--model_name", checkpoints("qwen3_moe"), "--dataset", alpaca_file, "--train_type", train_type]
    found, rank = one_rank(warm_logits, [*more, "--adapter", run])[0]
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert rank == 4
    with pytest.raises(UserError, match=r"--lora_expert_rank 2: "):
        make_single_rank_job(*more[1:4:2], *more[4:], "--adapter", run, "--lora_expert_rank", "2")


def warm_logits(rank_info, args) -> tuple[torch.Tensor, int]:
    job, model = set_up(rank_info, args)
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.clone(), job.config.lora_expert_rank


class MatmulResults(TorchDispatchMode):
    """A context that counts the elements of the results that --activation_budget keeps."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements += result.numel() if func in MATMULS else 0
        return result


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_activation_budget_counts_the_branches(kind):
    layer = nn.Module()
    layer.self_attn, layer.experts = nn.Module(), add_adapters(kind, make_list(), NF4())
    layer.self_attn.o_proj = nn.Linear(H, H)
    x, index, weights = make_routing("random")
    with torch.no_grad(), MatmulResults() as results:
        layer.experts(x, index, weights)
    of_attention = 2 * H  # what attention returns, and o_proj's result
    found = _saved_elements(layer, FAMILY, K)
    assert found == results.elements / len(x) + of_attention


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_magnitudes_and_biases_of_stacks_do_not_decay(kind):
    """They are [E, O]. With LoRA+ they learn as fast as other vectors."""
    experts = add_adapters("dora", make_list(biased=True))
    if kind == "full":
        experts = stack_like(make_list(biased=True))[1]
    vectors = find_stacked_vectors(experts)
    optimizer = make_optimizer(experts.parameters(), "adamw", 1.0, 0.1, (), 4.0, vectors)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1.0, 0.1), (4.0, 0.0)]
    names = {parameter: name for name, parameter in experts.named_parameters()}
    last = "magnitude_change" if kind == "dora" else "bias"
    assert {names[p] for p in optimizer.param_groups[1]["params"]} == {f"gate_up.{last}", f"down.{last}"}


def test_bad_expert_ranks(checkpoints, alpaca_file):
    for kind, more, message in (
        ("llama", EXPERT_RANK, "--lora_expert_rank 4: the model has no routed experts"),
        ("qwen3_moe", [*EXPERT_RANK, "--lora_dropout", "0.1"], "--lora_dropout 0.1: adapters on experts"),
        ("qwen3_moe", ["--lora_expert_rank", "65"], "--lora_expert_rank 65: no linear has more than 64"),
    ):
        with pytest.raises(UserError, match=message):
            make_single_rank_job(checkpoints(kind), alpaca_file, "--train_type", "qlora", *more)
    with pytest.raises(UserError, match="--lora_expert_rank has no effect with --train_type full"):
        parse(["--train_type", "full", *EXPERT_RANK])
