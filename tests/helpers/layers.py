"""Single 4-bit and adapter layers with contents."""

from __future__ import annotations

import torch
from torch import nn

from models.dora import DoRALinear
from models.lora import LoRALinear
from quantization.layer import Linear4bit
from quantization.nf4 import NF4

CPU = torch.device("cpu")
O, I, R, ALPHA = 48, 64, 8, 20  # sizes of adapter layers  # noqa: E741


def quantized(weight: torch.Tensor, dtype: torch.dtype, bias=None, quantizer=NF4()) -> Linear4bit:  # noqa: B008
    """Return a 4-bit layer on the CPU that computes in `dtype`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer = Linear4bit(linear, dtype, quantizer)
    layer.fill_buffers(CPU)
    for name, content in layer.convert_tensor("weight", weight).items():
        getattr(layer, name).data.copy_(content)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer


def quantized_like(weight: torch.Tensor, quantizer=NF4()) -> Linear4bit:  # noqa: B008
    """Return a 4-bit layer that computes in the weight's dtype, on its device."""
    with weight.device:
        layer = Linear4bit(nn.Linear(weight.shape[1], weight.shape[0], bias=False), weight.dtype, quantizer)
    layer.fill_buffers(weight.device)
    for name, content in layer.convert_tensor("weight", weight).items():
        getattr(layer, name).data.copy_(content)
    return layer


def weights_far_from_zero(n: int) -> torch.Tensor:
    """Return weights [n, 64] far from 0; with 8 bits their zero point is 65,536 or more."""
    return 4.5 + 1e-3 * torch.randn(n, 64)


def fill_layer(layer: LoRALinear, weight: torch.Tensor, bias: torch.Tensor, seed: int = 0) -> LoRALinear:
    """Pack `weight` into a layer's base and make its adapters random."""
    generator = torch.Generator().manual_seed(seed)
    for module in layer.modules():
        if hasattr(module, "fill_buffers"):
            module.fill_buffers(CPU)
    params = dict(layer.named_parameters())
    contents = layer.convert_tensor("weight", weight) | layer.convert_tensor("bias", bias)
    for name, content in contents.items():
        params[name].data.copy_(content)
    for name in ("lora_A", "lora_B", "magnitude_change"):
        if name in params:
            values = torch.randn(params[name].shape, generator=generator) * 0.1
            params[name].data = values.to(params[name].dtype)
    return layer


def dora(base: nn.Module, dropout: float = 0.0) -> DoRALinear:
    return DoRALinear(base, (O, I), R, ALPHA / R, dropout, torch.float32)
