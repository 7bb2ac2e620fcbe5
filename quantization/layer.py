"""The linear layer over a packed weight, `Linear4bit`, and the interface between modules and the load.

A packed weight is two frozen parameters, `codes` and `scales`, in a float storage dtype. Their bytes are
never read as numbers, so that `fully_shard` shards, gathers and offloads both with the layer's other weights.
The quantizer defines the bytes' format (quantization/quantizers.py).

The storage dtype is fp32, for any compute dtype. In 16 bits the bytes would not survive: FSDP copies shards
with torch._foreach_copy_, whose CUDA kernel converts bf16 and fp16 to float and back. That turns every NaN
pattern, one element in 256 of random bytes, into the same NaN. For the same reason these parameters must
never be cast: FSDP's param_dtype stays None where there are packed weights (wrapping.py).

Shapes: O output features, I input features, R rank, T tokens (all leading dimensions of x).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from quantization.operator_registry import compute_dtype, register_quantizer
from quantization.operators import dequantize, linear4bit, round_rows
from quantization.packing import pack_weight
from quantization.quantizers import PackedWeight, Quantizer, flat_bytes
from quantization.rounded import fits

STORAGE = torch.float32


def to_storage(data: torch.Tensor) -> torch.Tensor:
    """Return data's bytes as a 1-D tensor of STORAGE, zero-padded to a whole element."""
    raw = flat_bytes(data)
    return F.pad(raw, (0, -raw.numel() % STORAGE.itemsize)).view(STORAGE)


@dataclass(frozen=True)
class Part:
    """The part of a parameter that one tensor of the checkpoint fills: a range of its flattened elements.

    Attributes:
        begin: first element.
        numel: number of elements.
    """

    begin: int
    numel: int


class ConvertingModule(nn.Module):
    """A module that converts the checkpoint's tensors into its parameters, or initializes these itself.

    The streaming load calls these methods. The defaults convert nothing: tensors are parameters of the same
    name. Names are relative to this module. A tensor's name has dots if its module in the checkpoint is below
    this one, and not built (`locate_tensor`).
    """

    def parameters_from(self, name: str) -> tuple[str, ...]:
        """Return the names of the parameters that the checkpoint's tensor `name` fills."""
        return (name,)

    def quantizer_for(self, name: str) -> Quantizer | None:
        """Return the quantizer that packs the checkpoint's tensor `name`, if any does."""
        return None

    def part_of(self, name: str, parameter: str) -> Part | None:
        """Return the part of the parameter that the tensor `name` fills; None if that is all of it."""
        return None

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the checkpoint's tensor `name`, which fills a part of a parameter."""
        raise NotImplementedError

    def convert_tensor(self, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
        """Return {parameter: full contents} from the full tensor `name`, packed already or not.

        The keys are those of `parameters_from`. The contents of a part are of any shape.
        """
        assert isinstance(tensor, torch.Tensor)
        return {name: tensor}

    def initial_values(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return {parameter: full contents}, on the CPU, of parameters that no checkpoint holds.

        The values are the same on every rank.
        """
        return {}

    def fill_buffers(self, device: torch.device) -> None:
        """Set this module's buffers, which no checkpoint holds, on the device. By default there are none."""


def locate_tensor(model: nn.Module, name: str) -> tuple[str, nn.Module, str]:
    """Return (path, module, name there) of the module that the checkpoint's tensor `name` belongs to.

    That is the lowest module on the tensor's path that the model has. The path is without wrappers, whose
    attributes are those of the modules in them.
    """
    segments, module, depth = name.split("."), model, 0
    while depth < len(segments) - 1:
        below = getattr(module, segments[depth], None)
        if not isinstance(below, nn.Module):
            break
        module, depth = below, depth + 1
    return ".".join(segments[:depth]), module, ".".join(segments[depth:])


def part_of(module: nn.Module, name: str, parameter: str) -> Part | None:
    """Return the part of the parameter that the checkpoint's tensor `name` fills; None if it is all of it."""
    return module.part_of(name, parameter) if isinstance(module, ConvertingModule) else None


def stored_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """Return the shape of the checkpoint's tensor `name`, which fills a part of a parameter."""
    assert isinstance(module, ConvertingModule)
    return module.stored_shape(name)


def parameters_from(module: nn.Module, name: str) -> tuple[str, ...]:
    """Return the names of the parameters that the checkpoint's tensor `name` fills, for any module.

    A plain module's is (name,).
    """
    return module.parameters_from(name) if isinstance(module, ConvertingModule) else (name,)


def convert_tensor(
    module: nn.Module, name: str, tensor: torch.Tensor | PackedWeight
) -> dict[str, torch.Tensor]:
    """Return {parameter: full contents} from the full tensor `name`, for any module.

    A plain module's is {name: tensor}; its tensor must not be packed.
    """
    if isinstance(module, ConvertingModule):
        return module.convert_tensor(name, tensor)
    assert isinstance(tensor, torch.Tensor)
    return {name: tensor}


def quantizer_for(module: nn.Module, name: str) -> Quantizer | None:
    """Return the quantizer that packs the checkpoint's tensor `name`; None for a plain module."""
    return module.quantizer_for(name) if isinstance(module, ConvertingModule) else None


class Linear4bit(ConvertingModule):
    """A frozen linear layer with a packed weight in float storage: [T, I] -> [T, O] in x's dtype.

    Replaces `linear`, keeps its bias, and is made on its device (meta). dtype: of the dequantized weight.
    """

    codes: nn.Parameter
    scales: nn.Parameter
    table: torch.Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, quantizer: Quantizer):
        super().__init__()
        self.out_features, self.in_features = self.shape = tuple(linear.weight.shape)
        self.dtype, self.quantizer, device = dtype, quantizer, linear.weight.device
        self.quantizer_name = register_quantizer(quantizer)
        for name, n_bytes in zip(("codes", "scales"), quantizer.packed_sizes(self.shape), strict=True):
            data = torch.empty(-(-n_bytes // STORAGE.itemsize), dtype=STORAGE, device=device)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)  # the operator has no gradient for it
        self.register_buffer("table", None, persistent=False)
        self.copies_result = False  # set by models/adapters.py where the model changes the result in place
        # Set by `round_matmuls`: how the large matmuls are rounded, "" = not; and whether also in evaluation.
        self.rounding, self.rounds_in_evaluation = "", False

    @property
    def weight(self) -> torch.Tensor:
        """The [O, I] weight, dequantized at each access. Needs parameters that are gathered."""
        return self.dequantize(self.codes, self.scales)

    @property
    def supports_row_scale(self) -> bool:
        """Whether each row has whole blocks, so that their scales can include the row's scale."""
        return self.in_features % self.quantizer.block == 0

    def forward(
        self,
        x: torch.Tensor,
        row_scale: torch.Tensor | None = None,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
        dropout: float = 0.0,
        save_output: bool = False,
    ) -> torch.Tensor:
        """Return x (diag(g) W)^T + bias + dropout(x) a^T b^T: [T, I] -> [T, O].

        Args:
            x: [T, I].
            row_scale: g [O] fp32, or None for ones.
            a, b: the low-rank branch, [R, I] and [O, R], or None.
            dropout: probability, on the low-rank branch.
            save_output: save the result for backward instead of a recompute (`linear4bit`).
        """
        assert row_scale is None or self.bias is None, "a bias is not rescaled"
        x = x.to(compute_dtype(x))
        packed, h = (self.codes, self.scales, self.table, self.quantizer_name, self.shape), None
        if a is not None and b is not None:
            a, b = a.to(x.dtype), b.to(x.dtype)
            if dropout:
                h, a = F.linear(F.dropout(x, dropout), a), None
            else:
                with torch.no_grad():  # the operator forms the gradients that go through h
                    h = F.linear(x, a)
        bias = None if self.bias is None else self.bias.to(x.dtype)  # fp32 under autocast
        rounding = self.rounding if self.training or self.rounds_in_evaluation else ""
        rounded = rounded_scale = None
        if rounding:
            with torch.no_grad():
                rounded, rounded_scale = round_rows(x, rounding)
        y = linear4bit(x, *packed, row_scale, bias, h, a, b, save_output, rounded, rounded_scale, rounding)
        return y.clone() if self.copies_result else y  # backward needs the operator's own

    def parameters_from(self, name: str) -> tuple[str, ...]:
        return ("codes", "scales") if name == "weight" else (name,)

    def quantizer_for(self, name: str) -> Quantizer | None:
        return self.quantizer if name == "weight" else None

    def convert_tensor(self, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
        """Return {codes, scales} of a weight [O, I], packed unless it is already; a bias stays as it is."""
        if name != "weight":
            return super().convert_tensor(name, tensor)
        packed = pack_weight(name, tensor, self.quantizer)
        assert isinstance(packed, PackedWeight)
        return {"codes": to_storage(packed.codes), "scales": to_storage(packed.scales)}

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the [O, I] weight, in the layer's dtype, of full codes and scales as in `convert_tensor`."""
        return dequantize((codes, scales, self.table), self.quantizer_name, self.shape, self.dtype)

    def fill_buffers(self, device: torch.device) -> None:
        self.table = self.quantizer.table(device)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" {self.quantizer}"
        )


def quantize_linears(model: nn.Module, quantizers: dict[str, Quantizer], dtype: torch.dtype) -> None:
    """Replace each linear {name: quantizer} of a meta model by a Linear4bit that dequantizes to `dtype`."""
    for name, quantizer in quantizers.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, Linear4bit(linear, dtype, quantizer))


def round_matmuls(linears: dict[str, Linear4bit], rounding: str, in_evaluation: bool = False) -> list[str]:
    """Let linears {name: module} multiply in 8 bits; return the names of those whose shape does not fit.

    Args:
        linears: they are changed.
        rounding: name of one of ROUNDINGS (quantization/rounded.py).
        in_evaluation: also in evaluation, which otherwise multiplies in 16 bits.
    """
    others = []
    for name, linear in linears.items():
        if fits(linear.shape, linear.quantizer.block):
            linear.rounding, linear.rounds_in_evaluation = rounding, in_evaluation
        else:
            others.append(name)
    return others
