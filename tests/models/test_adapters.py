"""LoRA and DoRA against their equations and against PEFT, with random adapters; what is trained; step 0."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

import models.dora
from models.dora import DoRALinear
from models.lora import LoRALinear
from options.methods import METHODS
from quantization import operators
from quantization.dora_operators import factored_norm
from quantization.hqq import HQQ
from quantization.layer import Linear4bit
from quantization.nf4 import NF4
from tests.helpers.adapters import args_for, build_peft_model, trained_names
from tests.helpers.layers import ALPHA, I, O, R, dora, fill_layer, quantized
from tests.helpers.logits import IDS, loss_and_logits, summed_cross_entropy
from tests.helpers.products import products, slow
from tests.helpers.runs import outputs, transformers_model
from tests.helpers.tiny import CONFIGS, OTHERS, QUICK

QUANTIZERS = [NF4(), HQQ(8), HQQ(4), HQQ(2), HQQ(3, 48)]  # 48: groups cross rows, no row scales
LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def dora_equation(
    layer: DoRALinear, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Compute DoRA as in its paper, in float64 and with a materialised updated weight."""
    a, b = layer.lora_A.double(), layer.lora_B.double()
    updated = weight.double() + ALPHA / R * b @ a
    magnitude = weight.double().norm(dim=1) + layer.magnitude_change.double()
    direction = updated / updated.norm(dim=1, keepdim=True).detach()
    return (x.double() @ (magnitude[:, None] * direction).T + bias.double()).float()


@pytest.mark.parametrize("concatenates", [False, True])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_qdora_is_dense_dora_is_the_equation(quantizer, concatenates, monkeypatch):
    """concatenates: compute the low-rank branch in the large matmul, as a GPU does for wide outputs."""
    monkeypatch.setattr(operators, "_concatenates_branch", lambda *_: concatenates)
    weight, bias, x = torch.randn(O, I), torch.randn(O), torch.randn(3, 7, I)
    frozen = quantized(weight, torch.float32, None, quantizer)
    four_bit = fill_layer(dora(Linear4bit(nn.Linear(I, O), torch.float32, quantizer)), weight, bias)
    dense = fill_layer(dora(nn.Linear(I, O)), frozen.weight, bias)
    torch.testing.assert_close(four_bit(x), dense(x), rtol=1e-5, atol=1e-5)
    expected = dora_equation(four_bit, frozen.weight, bias, x)
    torch.testing.assert_close(four_bit(x), expected, rtol=1e-5, atol=1e-5)
    gradients = []
    for output in (four_bit(x), expected):
        parameters = [four_bit.lora_A, four_bit.lora_B, four_bit.magnitude_change]
        gradients.append(torch.autograd.grad(output.square().sum(), parameters))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_factored_norm_is_the_norm_of_the_updated_weight():
    weight, bias = torch.randn(O, I), torch.randn(O)
    layer = fill_layer(dora(nn.Linear(I, O)), weight, bias)
    updated = weight.double() + ALPHA / R * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(layer.updated_norm(), updated.norm(dim=1).float(), rtol=1e-6, atol=0)
    assert not layer.updated_norm().requires_grad


def test_compiled_norm_is_the_eager_norm():
    """In fp32, by Inductor, which once dropped s/2. Other tests compare graphs that are not lowered."""
    a, b, projected = torch.randn(R, I) * 0.1, torch.randn(O, R) * 0.1, torch.randn(O, R)
    operands = projected, a, b, ALPHA / R, torch.full((O,), 64.0)
    expected, compiled = factored_norm(*operands), torch.compile(factored_norm)
    torch.testing.assert_close(compiled(*operands), expected, rtol=1e-6, atol=0)


def test_a_row_of_zeros_is_no_nan():
    weight, bias = torch.randn(O, I), torch.randn(O)
    weight[3] = 0
    layer = fill_layer(dora(nn.Linear(I, O)), weight, bias)
    layer.lora_B.data.zero_()
    layer.magnitude_change.data.zero_()
    x = torch.randn(5, I)
    torch.testing.assert_close(layer(x), x @ weight.T + bias, rtol=1e-5, atol=1e-5)


def test_small_magnitude_changes_survive_bf16():
    """m in bf16 would lose a change of 0.1%; m - ||W|| does not."""
    weight, bias = torch.randn(O, I), torch.zeros(O)
    layer = DoRALinear(nn.Linear(I, O).bfloat16(), (O, I), R, ALPHA / R, 0.0, torch.bfloat16)
    fill_layer(layer, weight.bfloat16(), bias)
    layer.lora_B.data = torch.zeros(O, R, dtype=torch.bfloat16)
    norm = weight.bfloat16().float().norm(dim=1)
    layer.magnitude_change.data = (0.001 * norm).bfloat16()
    g = layer.magnitude() / layer.updated_norm()
    torch.testing.assert_close(g, torch.full((O,), 1.001), rtol=1e-5, atol=0)


def test_dropout_acts_on_the_low_rank_branch_only():
    weight, bias, x = torch.randn(O, I), torch.randn(O), torch.randn(2000, I)
    layer = fill_layer(dora(nn.Linear(I, O), dropout=0.5), weight, bias).train()
    layer.lora_B.data.zero_()  # without a low-rank branch nothing is random
    torch.testing.assert_close(layer(x), layer.eval()(x), rtol=0, atol=0)
    fill_layer(layer, weight, bias)
    assert not torch.equal(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("compiled_as", ["eager", "fullgraph"])
@pytest.mark.parametrize("quantizer", [NF4(), HQQ(4)], ids=str)
def test_layers_compile_without_a_graph_break(kind, compiled_as, quantizer):
    weight, bias, x = torch.randn(O, I), torch.randn(O), torch.randn(4, I)
    base = Linear4bit(nn.Linear(I, O), torch.float32, quantizer)
    layer = dora(base) if kind == "dora" else LoRALinear(base, (O, I), R, ALPHA / R, 0.0, torch.float32)
    fill_layer(layer, weight, bias)
    call = layer if compiled_as == "eager" else torch.compile(layer, fullgraph=True, backend="aot_eager")
    call(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters() if p.requires_grad)


def test_doras_output_is_freed_before_the_large_matmul_of_backward():
    """Its only reader, the magnitude's gradient, is an operand of that matmul in the compiled graph."""
    base = Linear4bit(nn.Linear(I, O), torch.float32, NF4())
    layer, graphs = fill_layer(dora(base), torch.randn(O, I), torch.randn(O)), []

    def record(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    x = torch.randn(4, I, requires_grad=True)
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(layer, fullgraph=True, backend=backend)(x).square().sum().backward()
    nodes = {n.name: n for n in graphs[-1].graph.nodes}
    before = nodes["linear4bit_backward"].all_input_nodes
    for node in before:  # the loop also reaches the nodes that it appends
        before.extend(n for n in node.all_input_nodes if n not in before)
    outputs = [n for n in nodes.values() if n.op == "placeholder" and n.meta["val"].shape == (4, O)]
    (y,) = (n for n in outputs if n.name != "tangents_1")
    assert set(y.users) <= set(before)


@pytest.mark.parametrize(
    ("kind", "train_type"),
    [
        *(("llama_bias", t) for t in ("lora", "dora", "qlora", "bnb_dora", "hqq_lora")),
        *((kind, "bnb_dora") for kind in ("gemma3", "phi3", "qwen3_moe")),
        ("qwen2", "hqq_dora"),
        # llama_bias has these train types; phi3's linears are in its bnb_dora.
        *slow(
            [
                ("qwen2", "lora"),
                ("qwen2", "dora"),
                ("qwen2", "qlora"),
                ("qwen2", "bnb_dora"),
                ("phi3", "lora"),
            ]
        ),
    ],
)
def test_model_equals_peft(train_type, kind, checkpoints, alpaca_file, one_rank):
    """The full model with alpha / rank = 2.5 and biases, on the same (dequantized) weights."""
    folder = checkpoints(kind)
    args = args_for(folder, alpaca_file, train_type)
    ours, state, adapters = one_rank(outputs, args, IDS)[0]
    model = build_peft_model(folder, state, adapters, METHODS[train_type].adapter == "dora").eval()
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), model.disable_adapter():  # without adapters the logits must differ
        assert (model(input_ids=IDS).logits - ours).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "train_type"),
    products(
        CONFIGS,
        ["full", "qlora", "bnb_dora"],
        # A family's layers and buffers are the same in each train type; `full` has dense experts, too.
        always=[
            *((kind, "bnb_dora") for kind in QUICK),
            *(("llama_bias", "full"), ("qwen3_moe", "full"), ("llama_bias", "qlora")),
        ],
        left_out=OTHERS,  # test_equal_to_peft.py has them, with adapters
    ),
)
def test_step_zero_is_the_base_model(kind, train_type, checkpoints, alpaca_file, one_rank):
    """Every family against transformers' own forward on the (dequantized) weights, before any training."""
    folder = checkpoints(kind)
    args = args_for(folder, alpaca_file, train_type)
    ours, state, _ = one_rank(outputs, args, IDS, False)[0]
    model = transformers_model(folder, state)
    with torch.no_grad():
        torch.testing.assert_close(ours, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


# Without and with a tied head, and with a cap. Others repeat these, or are in test_equal_to_peft.py.
LOSSES = ("llama", "qwen2", "gemma2")


@pytest.mark.parametrize("kind", [*LOSSES, *slow([kind for kind in CONFIGS if kind not in LOSSES])])
def test_the_loss_is_that_of_the_logits(kind, checkpoints, alpaca_file, one_rank):
    """It does not use transformers' forward, and must repeat its work between the head and the logits."""
    loss, logits = one_rank(loss_and_logits, args_for(checkpoints(kind), alpaca_file, "bnb_dora"))[0]
    assert loss == pytest.approx(summed_cross_entropy(logits), rel=1e-5)


@pytest.mark.parametrize(
    "train_type", [t for t, m in METHODS.items() if m.quantizer != "hqq" and not m.expansion]
)
def test_exact_set_of_trained_names(train_type, checkpoints, alpaca_file, one_rank):
    names = one_rank(trained_names, args_for(checkpoints("llama_bias"), alpaca_file, train_type))[0]
    trained = {"lora": ["lora_A", "lora_B"], "dora": ["lora_A", "lora_B", "magnitude_change"]}
    if METHODS[train_type].adapter:
        layers = [f"model.layers.{i}.{linear}" for i in range(3) for linear in LINEARS]
        expected = {f"{layer}.{name}" for layer in layers for name in trained[METHODS[train_type].adapter]}
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoints("llama_bias"))
        expected = {name for name, _ in model.named_parameters()}
    assert names == expected


@pytest.mark.parametrize(
    ("targets", "linears"),
    [("default", {"q_proj", "v_proj"}), ("o_proj, mlp.up_proj", {"o_proj", "up_proj"})],
)
def test_target_modules(targets, linears, checkpoints, alpaca_file, one_rank):
    args = args_for(checkpoints(), alpaca_file, "qlora", "--lora_target_modules", targets)
    names = one_rank(trained_names, args)[0]
    assert {n.split(".")[-2] for n in names} == linears
    assert len(names) == 3 * 2 * 2


def test_recompute_reuses_the_norm_and_never_a_stale_one(monkeypatch):
    calls, original = [], models.dora.project4bit
    monkeypatch.setattr(models.dora, "project4bit", lambda *args: (calls.append(1), original(*args))[1])
    layer = fill_layer(
        dora(Linear4bit(nn.Linear(I, O), torch.float32, NF4())), torch.randn(O, I), torch.randn(O)
    )
    x = torch.randn(5, I, requires_grad=True)
    for step in (1, 2):
        expected = torch.autograd.grad(layer(x).square().sum(), layer.lora_A)[0]
        before = len(calls)
        checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        assert len(calls) == before + 1, "one norm for forward and recompute together"
        torch.testing.assert_close(layer.lora_A.grad, expected, rtol=0, atol=0)
        layer.lora_A.data, layer.lora_A.grad = layer.lora_A.data + step, None
