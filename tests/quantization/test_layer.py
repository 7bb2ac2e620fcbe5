"""The 4-bit linear layer: it computes with its dequantized weight, and saves only the packed one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantization.hqq import HQQ
from quantization.layer import STORAGE, to_storage
from quantization.nf4 import NF4
from tests.helpers.layers import quantized


@pytest.mark.parametrize("quantizer", [NF4(), HQQ(4), HQQ(3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_are_those_of_the_dequantized_weight(dtype, quantizer):
    weight, bias = torch.randn(48, 64), torch.randn(48)
    layer = quantized(weight, dtype, bias, quantizer)
    dense = layer.weight
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    y, expected = layer(x), nn.functional.linear(other, dense, bias.to(dtype))
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-6, atol=1e-6)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == []


@pytest.mark.parametrize("quantizer", [NF4(), HQQ(4)], ids=str)
def test_only_packed_weights_are_saved_for_backward(quantizer):
    """The dequantized weight would take 16 bits per weight from forward to backward."""
    layer, saved = quantized(torch.randn(256, 256), torch.float32, None, quantizer), []
    x = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.nbytes), t)[1], lambda t: t):
        layer(x).sum()
    # Codes 32 KiB, scales 1 to 4 KiB, the table 1 KiB; a dense weight is 256 KiB.
    assert sum(saved) < 256 * 256


@pytest.mark.parametrize("quantizer", [NF4(), HQQ(4), HQQ(3)], ids=str)
def test_forward_and_backward_compile_without_a_graph_break(quantizer):
    layer = quantized(torch.randn(64, 64), torch.float32, torch.randn(64), quantizer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    compiled(x).sum().backward()
    layer(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=0, atol=0)


def test_storage_holds_any_bytes():
    raw = torch.cat([torch.full((4,), 255), torch.randint(0, 256, (1019,))]).to(torch.uint8)
    stored = to_storage(raw)  # a part of an element: padded with a zero byte
    assert stored.dtype == STORAGE and stored[0].isnan()
    assert torch.equal(stored.view(torch.uint8), torch.cat([raw, torch.zeros(1, dtype=torch.uint8)]))
