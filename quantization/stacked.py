"""A linear of all experts of a layer as one module: dense (`StackedLinear`) or packed (`StackedLinear4bit`).

A stack has E P members, each the weight [O, I] of a linear in the checkpoint: those of expert 0, then those
of expert 1, and so on. P is 2 where gate and up are one matmul, else 1. A tensor of the checkpoint is named
by its member here, such as `7.weight`, and fills that member's part of a parameter. So a load needs no more
memory than one tensor, and a member is quantized as alone.

Shapes: N rows, sorted by expert; E experts, P members of an expert, M = E P members; O output and I input
features of a member.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from quantization.grouped_operators import grouped_linear, grouped_linear4bit, grouped_project4bit
from quantization.layer import STORAGE, ConvertingModule, Part, to_storage
from quantization.operator_registry import compute_dtype, register_quantizer
from quantization.packing import pack_weight
from quantization.quantizers import PackedWeight, Quantizer


class StackedModule(ConvertingModule):
    """The linears of E experts: rows [N, I], sorted by expert -> [N, P O] in x's dtype.

    Args:
        linears: the P linears of one expert, of one shape. The stack has their biases, device and dtype, and
            is trained if they are.
        experts: E.
    """

    bias: nn.Parameter | None

    def __init__(self, linears: Sequence[nn.Linear], experts: int):
        super().__init__()
        first = linears[0]
        assert len({tuple(linear.weight.shape) for linear in linears}) == 1
        self.out_features, self.in_features = first.weight.shape
        self.experts, self.parts = experts, len(linears)
        self.register_parameter("bias", None)
        if first.bias is not None:
            shape = (experts, self.parts * self.out_features)
            bias = torch.empty(shape, dtype=first.bias.dtype, device=first.bias.device)
            self.bias = nn.Parameter(bias, requires_grad=first.bias.requires_grad)

    def _size(self, parameter: str) -> int:
        """Return the elements of a member in a parameter."""
        whole = self.get_parameter(parameter).numel()
        return whole // (self.experts * self.parts)

    def parameters_from(self, name: str) -> tuple[str, ...]:
        return (name.partition(".")[2],)

    def part_of(self, name: str, parameter: str) -> Part:
        size = self._size(parameter)
        return Part(int(name.partition(".")[0]) * size, size)

    def convert_tensor(self, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
        """Return {parameter: contents of a member's part} of a member's weight [O, I] or bias [O]."""
        assert isinstance(tensor, torch.Tensor)
        return {name.partition(".")[2]: tensor}

    def stored_shape(self, name: str) -> tuple[int, ...]:
        weight = (self.out_features, self.in_features)
        return weight if name.endswith(".weight") else weight[:1]

    def cast_bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, experts={self.experts},"
            f" parts={self.parts}, bias={self.bias is not None}"
        )


class StackedLinear(StackedModule):
    """A stack of dense weights, one parameter [E, P O, I]. Arguments as for StackedModule."""

    def __init__(self, linears: Sequence[nn.Linear], experts: int):
        super().__init__(linears, experts)
        weight = linears[0].weight
        shape = (experts, self.parts * self.out_features, self.in_features)
        data = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.weight = nn.Parameter(data, requires_grad=weight.requires_grad)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor, has_bias: bool = True) -> torch.Tensor:
        """Return x W^T + bias of each row's expert: [N, P O].

        Args:
            x: [N, I].
            offsets: [E] int32, the end of each expert's rows.
            has_bias: whether to add the bias.
        """
        dtype = compute_dtype(x)
        bias = self.cast_bias(dtype) if has_bias else None
        return grouped_linear(x.to(dtype), offsets, self.weight.to(dtype), bias)

    def project(self, a: torch.Tensor) -> torch.Tensor:
        """Return W a^T of each expert: [E, P O, R] in the weights' dtype. a: [E, R, I]."""
        return torch.bmm(self.weight, a.to(self.weight.dtype).mT)

    def member_weight(self, converted: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a member's weight [O, I] as forward uses it, of the contents from `convert_tensor`."""
        return converted["weight"].to(self.weight.dtype)

    def members(self) -> torch.Tensor:
        """Return the members' weights: [M, O, I]. Needs parameters that are gathered."""
        return self.weight.view(-1, self.out_features, self.in_features)


class StackedLinear4bit(StackedModule):
    """A stack of frozen packed weights in float storage, the members' codes and scales one after another.

    Args:
        linears, experts: as for StackedModule.
        dtype: of the dequantized weights.
        quantizer: packs each member.
    """

    codes: nn.Parameter
    scales: nn.Parameter
    table: torch.Tensor | None

    def __init__(self, linears: Sequence[nn.Linear], experts: int, dtype: torch.dtype, quantizer: Quantizer):
        super().__init__(linears, experts)
        self.dtype, self.quantizer, self.quantizer_name = dtype, quantizer, register_quantizer(quantizer)
        sizes = quantizer.packed_sizes((self.out_features, self.in_features))
        for name, n_bytes in zip(("codes", "scales"), sizes, strict=True):
            elements = experts * self.parts * -(-n_bytes // STORAGE.itemsize)
            data = torch.empty(elements, dtype=STORAGE, device=linears[0].weight.device)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))
        if self.bias is not None:
            self.bias.requires_grad_(False)  # the operator has no gradient for it
        self.register_buffer("table", None, persistent=False)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor, has_bias: bool = True) -> torch.Tensor:
        """Return x W^T + bias of each row's expert: [N, P O]; arguments as for StackedLinear."""
        x = x.to(compute_dtype(x))
        bias = self.cast_bias(x.dtype) if has_bias else None
        return grouped_linear4bit(x, offsets, *self._packed(), bias)

    def _packed(self) -> tuple:
        """Return the operators' arguments for the stack: codes, scales, table, quantizer and shape."""
        shape = [self.experts, self.parts, self.out_features, self.in_features]
        return self.codes, self.scales, self.table, self.quantizer_name, shape

    def project(self, a: torch.Tensor) -> torch.Tensor:
        """Return W a^T of each expert: [E, P O, R] in the weights' dtype. a: [E, R, I]."""
        return grouped_project4bit(*self._packed(), a.to(self.dtype))

    def member_weight(self, converted: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a member's weight [O, I] as forward uses it, of the contents from `convert_tensor`."""
        codes, scales = (converted[name].view(torch.uint8) for name in ("codes", "scales"))
        shape = (self.out_features, self.in_features)
        return self.quantizer.dequantize(codes, scales, self.table, shape, self.dtype)

    def members(self) -> torch.Tensor:
        """Return the members' weights: [M, O, I]. Needs parameters that are gathered."""
        return self.dequantize(self.codes, self.scales)

    def parameters_from(self, name: str) -> tuple[str, ...]:
        return ("codes", "scales") if name.endswith(".weight") else super().parameters_from(name)

    def quantizer_for(self, name: str) -> Quantizer | None:
        return self.quantizer if name.endswith(".weight") else None

    def convert_tensor(self, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
        """Return {codes, scales} of a member's weight, packed unless it is already; a bias stays as it is."""
        if not name.endswith(".weight"):
            return super().convert_tensor(name, tensor)
        packed = pack_weight(name, tensor, self.quantizer)
        assert isinstance(packed, PackedWeight)
        return {"codes": to_storage(packed.codes), "scales": to_storage(packed.scales)}

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the weights [M, O, I], in the layer's dtype, of full codes and scales."""
        members = self.experts * self.parts
        raw_codes, raw_scales = (t.view(torch.uint8).view(members, -1) for t in (codes, scales))
        shape = (self.out_features, self.in_features)
        return self.quantizer.dequantize_stack(raw_codes, raw_scales, self.table, shape, self.dtype)

    def fill_buffers(self, device: torch.device) -> None:
        self.table = self.quantizer.table(device)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quantizer}"
