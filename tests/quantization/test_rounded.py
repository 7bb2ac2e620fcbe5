"""Matmuls in 8 bits: the layer against float64 with the same rounded operands, zeros, infinities, shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from quantization import operators, rounded
from quantization.hqq import HQQ
from quantization.layer import round_matmuls
from quantization.nf4 import NF4
from quantization.rounded import ROUNDINGS, _ones, fits, round_rows
from tests.helpers.layers import quantized

ROWS, WIDTH, RANK = 48, 128, 8


def rounded_layer(quantizer, rounding: str, dtype=torch.float32, bias: torch.Tensor | None = None):
    layer = quantized(torch.randn(ROWS, WIDTH), dtype, bias, quantizer)
    assert round_matmuls({"": layer}, rounding) == []
    return layer


def exact_rounding(x: torch.Tensor, largest: torch.Tensor, rounding: str) -> torch.Tensor:
    """Return x in float64, rounded with the scale that makes `largest` the format's largest number."""
    form = ROUNDINGS[rounding]
    scaled = (x.double() * (form.largest / largest.double())).clamp(-form.largest, form.largest)
    codes = scaled.round() if rounding == "int8" else scaled.float().to(form.dtype).double()
    return codes * (largest.double() / form.largest)


def close(value: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    error = (value.double() - exact).norm() / exact.norm()
    assert error < tolerance, error


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("quantizer", [NF4(), NF4(double=False), HQQ(4), HQQ(3)], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "row scale"])
def test_layer_equals_float64_with_the_same_rounded_operands(quantizer, rounding, scaled):
    """The weight's scale bounds its row, so it is at most twice what the row's largest value would give."""
    layer = rounded_layer(quantizer, rounding)
    dense = layer.weight
    g = (torch.rand(ROWS) + 0.5).requires_grad_() if scaled else None
    x = (torch.randn(5, WIDTH) * torch.logspace(-3, 3, 5)[:, None]).requires_grad_()
    a, b = torch.randn(RANK, WIDTH, requires_grad=True), torch.randn(ROWS, RANK, requires_grad=True)
    y = layer(x, g, a, b)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, a, b, *([g] if scaled else [])], grad)

    packed = layer.codes.view(torch.uint8), layer.scales.view(torch.uint8), layer.table
    bounds = layer.quantizer.block_bounds(packed[1], packed[2], layer.shape).view(ROWS, -1).amax(1)
    largest = dense.abs().amax(1)
    assert (bounds >= largest * (1 - 1e-6)).all() and (bounds <= 2.1 * largest).all()
    row = torch.ones(ROWS).double() if g is None else g.detach().double()
    w8 = exact_rounding(dense, bounds[:, None], rounding)
    x8 = exact_rounding(x, x.detach().abs().amax(1, keepdim=True), rounding)
    h = x.detach().double() @ a.detach().double().t()
    base = x8 @ w8.t() * row
    # Rounding may differ where a number is near the middle of two: the kernels multiply by reciprocals.
    close(y, base + h @ b.detach().double().t(), 2e-3)
    exact_grad = grad.double() * row * (bounds.double() / ROUNDINGS[rounding].largest)
    grad8 = exact_rounding(exact_grad, exact_grad.abs().amax(1, keepdim=True), rounding)
    codes = w8 / (bounds[:, None].double() / ROUNDINGS[rounding].largest)
    grad_h = grad.double() @ b.detach().double()
    close(grads[0], grad8 @ codes + grad_h @ a.detach().double(), 2e-3)
    close(grads[1], grad_h.t() @ x.detach().double(), 1e-5)  # not rounded
    close(grads[2], grad.double().t() @ h, 1e-5)
    if scaled:
        close(grads[3], (grad.double() * base / row).sum(0), 1e-2)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_errors_of_a_layer_are_those_of_its_format(rounding):
    """e4m3 has three bits after the leading one; integers divide the range of a row into 254 parts."""
    layer = rounded_layer(NF4(), rounding)
    x = torch.randn(64, WIDTH)
    exact = nn.functional.linear(x.double(), layer.weight.double())
    error = (layer(x).double() - exact).norm() / exact.norm()
    assert 0.005 < error < (0.05 if rounding == "fp8" else 0.02)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zeros_stay_zero_and_infinities_are_passed_on(rounding):
    layer = rounded_layer(NF4(), rounding)
    x = torch.randn(6, WIDTH)
    x[1] = 0
    x[2, 3], x[3, 4], x[4, 5] = math.inf, -math.inf, math.nan
    y = layer(x)
    assert (y[1] == 0).all()
    assert not y[2:5].isfinite().any() and y[[0, 5]].isfinite().all()
    alone = layer(x[[0, 5]])
    torch.testing.assert_close(y[[0, 5]], alone, rtol=1e-5, atol=1e-5)  # no token depends on another
    zero = quantized(torch.zeros(ROWS, WIDTH), torch.float32, None, NF4())
    round_matmuls({"": zero}, rounding)
    assert (zero(x[:2]) == 0).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_columns_are_scaled_before_they_are_rounded(rounding):
    form = ROUNDINGS[rounding]
    x, scale = torch.randn(4, 32, dtype=torch.bfloat16), torch.rand(32) * 100
    codes, row_scale = round_rows(x, form, scale)
    exact = x.double() * scale.double()
    largest = exact.abs().amax(1)
    torch.testing.assert_close(row_scale.double(), largest / form.largest, rtol=1e-6, atol=0)
    assert codes.dtype == form.dtype and (codes.float().abs().amax(1) == form.largest).all()
    close(codes.double() * row_scale.double()[:, None], exact, 0.04)


def test_evaluation_multiplies_in_16_bits_unless_asked():
    layer = rounded_layer(NF4(), "fp8")
    x = torch.randn(3, WIDTH)
    rounded = layer(x)
    exact = layer.eval()(x)
    torch.testing.assert_close(exact, nn.functional.linear(x, layer.weight))
    assert not torch.equal(rounded, exact)
    round_matmuls({"": layer}, "fp8", in_evaluation=True)
    assert torch.equal(layer(x), rounded)


def test_weights_of_other_shapes_stay_in_16_bits():
    assert fits((48, 128), 64)
    for shape in ((40, 128), (48, 96), (48, 72)):
        assert not fits(shape, 64)
    layer = quantized(torch.randn(40, 128), torch.float32, None, NF4())
    assert round_matmuls({"layer": layer}, "fp8") == ["layer"] and layer.rounding == ""


def test_a_bias_is_added_and_any_leading_dimensions_are_kept():
    bias = torch.randn(ROWS)
    layer = rounded_layer(NF4(), "fp8", torch.bfloat16, bias)
    x = torch.randn(2, 3, WIDTH, dtype=torch.bfloat16)
    y = layer(x)
    assert y.shape == (2, 3, ROWS) and y.dtype == torch.bfloat16
    close(y, nn.functional.linear(x.double(), layer.weight.double(), bias.double()), 0.05)
    assert layer(x[:0]).shape == (0, 3, ROWS)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_compiled_layer_rounds_an_x_once(rounding):
    """Two linears read it, and the compiler merges equal operators."""
    linears = nn.ModuleList(rounded_layer(NF4(), rounding) for _ in range(2))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def both(x):
        return linears[0](x) * linears[1](x)

    x = torch.randn(3, WIDTH, requires_grad=True)
    compiler = torch._dynamo.backends.common.aot_autograd(
        fw_compiler=torch._functorch.compilers.make_boxed_compiler(keep),
        partition_fn=torch._functorch.partitioners.min_cut_rematerialization_partition,  # Inductor's
    )
    compiled = torch.compile(both, fullgraph=True, backend=compiler)
    y = compiled(x)
    torch.testing.assert_close(y, both(x))
    grads = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grads, torch.autograd.grad(both(x).sum(), x))
    roundings = [n for g in graphs for n in g.graph.nodes if "round_rows" in str(n.target)]
    assert len(roundings) == 1


@pytest.mark.parametrize("roundings", [("int8", ""), ("", "int8"), ("int8", "fp8")])
def test_backward_of_several_linears_is_the_sum_of_each(roundings):
    """The compiler merges those of one x; a linear whose shape does not fit stays in 16 bits among them."""
    layers = [quantized(torch.randn(ROWS, WIDTH), torch.float32) for _ in roundings]
    grads, grad_h = [torch.randn(5, ROWS) for _ in layers], torch.randn(5, 2 * RANK)
    a = [torch.randn(RANK, WIDTH) for _ in layers]

    scales = [torch.randn(ROWS), None]

    def backward(chosen: list[int], h: torch.Tensor) -> torch.Tensor:
        packed = [[getattr(layers[i], name) for i in chosen] for name in ("codes", "scales", "table")]
        names = [layers[i].quantizer_name for i in chosen]
        own_grads, own_scales, own_a, own_roundings = (
            [values[i] for i in chosen] for values in (grads, scales, a, roundings)
        )
        shapes = [*layers[0].shape] * len(chosen)
        more = own_scales, h, own_a, [], own_roundings
        return operators.linear4bit_backward(own_grads, *packed, names, shapes, *more)

    each = [backward([i], h) for i, h in enumerate(grad_h.split(RANK, 1))]
    torch.testing.assert_close(backward([0, 1], grad_h), each[0] + each[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_parts_of_a_result_are_those_of_the_whole(rounding, monkeypatch):
    """Sums in 32 bits, and what is rounded, are in memory for a part of the tokens only."""
    layer, x = rounded_layer(NF4(), rounding, bias=torch.randn(ROWS)), torch.randn(50, WIDTH).requires_grad_()
    whole = layer(x)
    grad = torch.randn_like(whole)
    (whole_grad,) = torch.autograd.grad(whole, x, grad)
    monkeypatch.setattr(rounded, "AT_ONCE", 20 * WIDTH)
    monkeypatch.setattr(operators, "ROUNDED_AT_ONCE", 20 * ROWS)
    y = layer(x)
    torch.testing.assert_close(y, whole)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], whole_grad)


def test_cached_ones_keep_their_address():
    """A CUDA graph that was recorded with them reads it, also after a wider layer has been run."""
    device = torch.device("cpu")
    first = _ones(4, device)
    assert _ones(8, device).sum() == 8
    assert _ones(4, device) is first and (first == 1).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_operator_returns_what_a_compiler_is_told(rounding):
    """Also the strides, for an x of columns one after the other."""
    for x in (torch.randn(2, 3, WIDTH), torch.randn(WIDTH, 3).t(), torch.randn(0, WIDTH)):
        torch.library.opcheck(operators.round_rows._opoverload, (x, rounding))
