"""The fp8 kernels, and layers and runs with --base_matmul fp8, on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from models.dora import DoRALinear
from models.lora import LoRALinear
from quantization.hqq import HQQ
from quantization.layer import Linear4bit, round_matmuls
from quantization.nf4 import NF4
from quantization.rounded import ROUNDINGS, RoundedWeight, multiply, round_rows
from tests.helpers.layers import quantized_like
from tests.helpers.parity import arguments
from tests.helpers.runs import train_run

FP8 = ROUNDINGS["fp8"]
SHAPES = [(256, 512), (1024, 4096), (272, 14336), (16, 64)]
FORMATS = [NF4(), NF4(double=False), HQQ(4), HQQ(3)]


@pytest.fixture(autouse=True)
def _needs_fp8():
    if torch.cuda.get_device_capability() < FP8.capability:
        pytest.skip("this GPU has no fp8")


def rounded_weight(layer: Linear4bit, row_scale: torch.Tensor | None = None) -> RoundedWeight:
    packed = layer.codes.view(torch.uint8), layer.scales.view(torch.uint8), layer.table
    return RoundedWeight(*packed, layer.quantizer, layer.shape, row_scale, FP8)


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expanded_weights_are_the_rounded_dequantized_ones(shape, quantizer):
    """Bit for bit, by rows and transposed, also for rows of zeros."""
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    weight[3] = 0
    weight[5] *= 1000
    layer = quantized_like(weight, quantizer)
    bounds = layer.quantizer.block_bounds(layer.scales.view(torch.uint8), layer.table, layer.shape)
    bounds = bounds.view(shape[0], -1).amax(1).clamp_min(2.0**-100)
    packed = layer.codes.view(torch.uint8), layer.scales.view(torch.uint8), layer.table, layer.shape
    expected = layer.quantizer.dequantize(
        *packed, torch.float32, torch.full_like(bounds, FP8.largest) / bounds
    )
    g = torch.rand(shape[0], device="cuda")
    for row_scale in (None, g):
        own = bounds / FP8.largest * (1 if row_scale is None else g)
        weight = rounded_weight(layer, row_scale)
        by_rows, scale = weight.expand()
        found, own_inverse = weight.find_scales()
        for value in (scale, found):
            torch.testing.assert_close(value, own, rtol=1e-6, atol=0)
        transposed = weight.expand_transposed(own_inverse)
        assert by_rows.float().abs().max() <= FP8.largest
        assert torch.equal(by_rows.view(torch.uint8), expected.to(FP8.dtype).view(torch.uint8))
        assert transposed.is_contiguous()
        assert torch.equal(transposed.view(torch.uint8), by_rows.view(torch.uint8).t())


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [64, 4096, 14336, 28672])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_rounded_as_on_a_cpu(columns, dtype):
    x = (
        torch.randn(40, columns, device="cuda", dtype=dtype)
        * torch.logspace(-8, 8, 40, device="cuda").to(dtype)[:, None]
    )
    x[1] = 0
    scale = torch.rand(columns, device="cuda")
    for column_scale in (None, scale):
        codes, row_scale = round_rows(x, FP8, column_scale)
        expected, expected_scale = round_rows(
            x.cpu(), FP8, None if column_scale is None else column_scale.cpu()
        )
        torch.testing.assert_close(row_scale.cpu(), expected_scale, rtol=1e-6, atol=0)
        differs = codes.cpu().view(torch.uint8) != expected.view(torch.uint8)
        assert differs.float().mean() < 1e-3  # a division may round otherwise
    x[2, 3], x[3, 4] = math.inf, math.nan
    codes, row_scale = round_rows(x, FP8)
    product = codes.float().sum(1) * row_scale
    assert not product[2:4].isfinite().any() and product[4:].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(5, 16, 8), (300, 272, 64), (128, 512, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_rank_product_is_added_and_rounded_once(sizes, dtype):
    from quantization.low_rank_kernel import add_product  # needs Triton

    rows, columns, rank = sizes
    total = torch.randn(rows, columns, device="cuda", dtype=dtype)
    a = torch.randn(rows, rank + 8, device="cuda", dtype=dtype)[:, :rank]
    for b in (
        torch.randn(columns, rank, device="cuda").to(dtype).t(),
        torch.randn(rank, columns).cuda().to(dtype),
    ):
        expected = (total.double() + a.double() @ b.double()).to(dtype)
        torch.testing.assert_close(add_product(total.clone(), a, b), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [NF4(), HQQ(4), HQQ(3)], ids=str)
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("o, i", [(256, 512), (1024, 256)])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_layers_equal_their_plain_form(rounding, kind, o, i, quantizer):
    """The same layer on the CPU, where the rounded operands are multiplied in fp32."""
    base = quantized_like(torch.randn(o, i, device="cuda", dtype=torch.bfloat16), quantizer)
    layer = kind(base, (o, i), rank=16, scaling=2.0, dropout=0.0, dtype=torch.float32).cuda()
    with torch.no_grad():
        layer.lora_A.normal_(0, i**-0.5)
        layer.lora_B.normal_(0, 0.05)
        if kind is DoRALinear:
            layer.squared_norm.copy_(layer.compute_squared_norm(base.weight))
            layer.magnitude_change.copy_(layer.squared_norm.sqrt() * 0.1)
    round_matmuls({"": base}, rounding)
    x = torch.randn(3, 20, i, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(3, 20, o, device="cuda", dtype=torch.bfloat16)
    trained = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x)
    results = [y.detach(), *torch.autograd.grad(y, [x, *trained], grad)]
    torch.compiler.reset()  # a class's forward is compiled for eight sizes at most
    compiled = torch.compile(layer, fullgraph=True)(x)
    more = [compiled.detach(), *torch.autograd.grad(compiled, [x, *trained], grad)]
    layer.cpu()
    base.fill_buffers(torch.device("cpu"))
    own = x.detach().cpu().requires_grad_()
    y = layer(own)
    expected = [y.detach(), *torch.autograd.grad(y, [own, *trained], grad.cpu())]
    for found in (results, more):
        for value, other in zip(found, expected, strict=True):
            error = (value.cpu().float() - other.float()).norm() / other.float().norm()
            assert error < 0.01, error


@pytest.mark.gpu
@pytest.mark.parametrize("train_type", ["qlora", "bnb_dora", "hqq_lora", "hqq_dora"])
def test_runs_learn_as_in_16_bits(train_type, checkpoints, even_rows, one_rank):
    args = [*arguments(checkpoints("llama"), even_rows, train_type), "--batch_size", "4"]
    args += ["--max_steps", "12", "--num_epochs", "12", "--precision", "auto", "--compile", "true"]
    losses = [one_rank(train_run, [*args, "--base_matmul", way])[0][0] for way in ("16bit", "fp8")]
    assert losses[1] != losses[0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0.03, atol=0.01)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        "--use_gradient_checkpointing false",
        "--compile false",
        "--use_cpu_offload",
        "--activation_budget -1",
        "--use_activation_cpu_offload",
        "--cuda_graphs true",
    ],
)
def test_how_a_layer_is_run_changes_nothing(options, checkpoints, even_rows, one_rank):
    args = [*arguments(checkpoints("llama"), even_rows, "bnb_dora"), "--batch_size", "4"]
    args += ["--max_steps", "8", "--num_epochs", "8", "--precision", "auto", "--base_matmul", "fp8"]
    plain, other = (one_rank(train_run, [*args, *more.split()])[0][0] for more in ("", options))
    # Where a number is near the middle of two, any difference of rounding becomes one of fp8's.
    torch.testing.assert_close(torch.tensor(other), torch.tensor(plain), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_the_sum_has_the_accuracy_that_the_docs_state():
    """For the longest sum of an 8B model; the operands are exact."""
    torch.manual_seed(0)
    a = torch.randn(256, 14336, device="cuda").mul(100).clamp(-448, 448).to(FP8.dtype)
    b = torch.randn(512, 14336, device="cuda").mul(100).clamp(-448, 448).to(FP8.dtype)
    a_scale, b_scale = torch.rand(256, device="cuda") + 0.5, torch.rand(512, device="cuda") + 0.5
    exact = (a.double() @ b.double().t()) * a_scale.double()[:, None] * b_scale.double()
    y = multiply(a, a_scale, b, b_scale, torch.bfloat16)
    assert (y.double() - exact).norm() / exact.norm() < 5e-3
