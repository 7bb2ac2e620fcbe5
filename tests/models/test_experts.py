"""Stacks of experts compute what a list of experts computes, expert by expert."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from models.experts import check_packed_alike
from models.moe import find_stack
from options.errors import UserError
from quantization import grouped_operators
from quantization.grouped_adapters import scale_rows
from quantization.grouped_operators import (
    gather_rows,
    grouped_linear,
    grouped_linear_backward,
    grouped_weight_backward,
    sort_by_expert,
)
from quantization.hqq import HQQ
from quantization.layer import Part, locate_tensor
from quantization.nf4 import NF4
from tests.helpers.stacked_experts import (
    ROUTINGS,
    E,
    add_adapters,
    make_list,
    make_routing,
    run_experts,
    stack_like,
)

QUANTIZERS = [None, NF4(), HQQ(4), HQQ(3)]


@pytest.mark.parametrize("case", ROUTINGS)
def test_every_gradient_is_that_of_the_list(case):
    """Results and gradients of a dense list: the gradient of an expert without rows is 0, not missing."""
    original, stacked = stack_like(make_list())
    arguments = make_routing(case)
    for a, b in zip(run_experts(original, *arguments), run_experts(stacked, *arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for stack, linears in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
        expected = torch.stack(
            [torch.cat([getattr(expert, name).weight.grad for name in linears]) for expert in original]
        )
        torch.testing.assert_close(getattr(stacked, stack).weight.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mlp", [64, 48])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_packed_stacks_are_the_packed_list(quantizer, biased, mlp):
    """With an MLP of 64 the weights are square, so that a transposition would not show in shapes."""
    original, stacked = stack_like(make_list(mlp, biased), quantizer)
    arguments = make_routing("random")
    original.requires_grad_(False)
    stacked.requires_grad_(False)
    for a, b in zip(run_experts(original, *arguments), run_experts(stacked, *arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_of_biases():
    original, stacked = stack_like(make_list(biased=True))
    for module in (original, stacked):
        run_experts(module, *make_routing("idle"))
    expected = torch.stack([torch.cat([e.gate_proj.bias.grad, e.up_proj.bias.grad]) for e in original])
    torch.testing.assert_close(stacked.gate_up.bias.grad, expected, rtol=1e-5, atol=1e-5)
    expected = torch.stack([e.down_proj.bias.grad for e in original])
    torch.testing.assert_close(stacked.down.bias.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantizer", [NF4(), NF4(double=False), HQQ(3, 8)], ids=str)
def test_a_member_has_the_bytes_of_a_packed_linear(quantizer):
    """A weight fills neither a whole group of scales nor whole elements of the storage."""
    original, stacked = stack_like(make_list(mlp=MLP_OF_ODD_BYTES), quantizer)
    for i, linear in enumerate(getattr(e, name) for e in original for name in NAMES[:2]):
        for key in ("codes", "scales"):
            flat, part = getattr(stacked.gate_up, key), stacked.gate_up.part_of(f"{i}.weight", key)
            own = flat[part.begin : part.begin + part.numel]
            assert torch.equal(own.view(torch.uint8), getattr(linear, key).view(torch.uint8))


MLP_OF_ODD_BYTES = 5  # 5 x 64 weights have 5 scales
NAMES = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("quantizer", [None, NF4()], ids=str)
@pytest.mark.parametrize("case", ROUTINGS)
def test_torchs_grouped_matmul_is_the_loop(case, quantizer, monkeypatch):
    """By its kernel for CPUs; tests/gpu/test_experts.py has that for GPUs."""
    results = []
    for grouped in (True, False):
        monkeypatch.setattr(grouped_operators, "runs_grouped", lambda *_, grouped=grouped: grouped)
        experts = add_adapters("dora", make_list(64), quantizer, rank=8)
        experts.requires_grad_(quantizer is None)
        found = run_experts(experts, *make_routing(case))
        results.append(found + [p.grad for p in experts.parameters() if p.requires_grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_of_idle_experts_where_the_kernel_leaves_them(monkeypatch):
    """On GPUs of compute capability 10 torch's kernel does not write the products of empty groups."""
    compute = torch._grouped_mm

    def leave_empty_groups(a, b, offs):
        result = compute(a, b, offs=offs)
        if b.dim() == 2:
            counts = torch.diff(offs, prepend=offs.new_zeros(1))
            result[counts == 0] = float("nan")
        return result

    monkeypatch.setattr(torch, "_grouped_mm", leave_empty_groups)
    monkeypatch.setattr(grouped_operators, "runs_grouped", lambda *_: True)
    monkeypatch.setattr(grouped_operators, "grouped_matmul_fills_all", lambda device: False)
    _, stacked = stack_like(make_list())
    run_experts(stacked, *make_routing("idle"))
    for stack in (stacked.gate_up, stacked.down):
        assert not stack.weight.grad[E - 1].any() and stack.weight.grad[: E - 1].any()


def test_compiled_code_knows_the_strides_of_results():
    """For rows of other strides, too: compiled code relies on those of the operators' fakes."""
    x, offsets = torch.randn(8, 10).t(), torch.tensor([4, 4, 10], dtype=torch.int32)
    order = torch.randperm(10)
    for operator, *rest in (
        (scale_rows, torch.rand(3, 8), offsets),
        (grouped_linear, offsets, torch.randn(3, 16, 8), None),
        (grouped_linear_backward, offsets, torch.randn(3, 8, 16)),
        (grouped_weight_backward, offsets, torch.randn(16, 10).t()),
        (gather_rows, order, order.argsort(), 1),
    ):
        real = operator(x, *rest)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in (x, *rest)]
            fake = operator(*fakes)
        assert (fake.shape, fake.stride()) == (real.shape, real.stride()), operator


def test_order_of_rows():
    """Rows of one expert keep the tokens' order; offsets are the ends of the experts' rows."""
    index = torch.tensor([[3, 0], [0, 1], [3, 1]])
    order, inverse, offsets = sort_by_expert(index, 5)
    assert order.tolist() == [1, 2, 3, 5, 0, 4] and order[inverse].tolist() == list(range(6))
    assert offsets.tolist() == [2, 4, 4, 6, 6] and offsets.dtype == torch.int32


def test_a_tensor_of_an_expert_is_part_of_a_stack():
    model = nn.Module()
    model.experts = stack_like(make_list())[1]
    path, module, attribute = locate_tensor(model, "experts.2.up_proj.weight")
    assert (path, module, attribute) == ("experts", model.experts, "2.up_proj.weight")
    assert module.parameters_from(attribute) == ("gate_up.weight",)
    assert module.part_of(attribute, "gate_up.weight") == Part(5 * 48 * 64, 48 * 64)
    assert module.stored_shape(attribute) == (48, 64)
    assert find_stack("a.experts.2.up_proj.weight") == ("a.experts.gate_up.weight", 2)
    assert find_stack("a.shared_experts.up_proj.weight") is None
    assert find_stack("a.experts.gate.weight") is None


def test_members_that_are_packed_otherwise():
    model = nn.Module()
    model.experts = make_list()
    quantizers = {f"experts.{e}.{name}": NF4() for e in range(E) for name in NAMES}
    quantizers["experts.4.up_proj"] = NF4(double=False)
    with pytest.raises(UserError, match=r"^x: experts\.4\.up_proj is packed otherwise than experts\.0\.gate"):
        check_packed_alike(model, quantizers, "x")
    del quantizers["experts.4.up_proj"]
    with pytest.raises(UserError, match=r"^x: experts\.4\.up_proj is packed otherwise"):
        check_packed_alike(model, quantizers, "x")
    check_packed_alike(model, {}, "x")
