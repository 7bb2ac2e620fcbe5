"""A linear layer over a packed weight, in parameters that FSDP can shard, and what the load asks of a module.

A packed weight is two frozen parameters, `codes` and `scales`, in a float storage dtype. Their bytes are
never read as numbers, so that `fully_shard` shards, gathers and offloads both with the layer's other weights.
What the bytes mean is the quantizer's business (quantization/quantizers.py).

The storage dtype is fp32, whatever the compute dtype. In 16 bits the bytes would not survive: FSDP copies
shards with torch._foreach_copy_, whose CUDA kernel converts bf16 and fp16 to float and back, which turns
every NaN pattern, one element in 256 of random bytes, into the same NaN. For the same reason these parameters
must never be cast: FSDP's param_dtype stays None where there are packed weights (wrapping.py).

Shapes: O output features, I input features, R rank, T tokens (all leading dimensions of x).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from quantization.operators import compute_dtype, dequantize, linear4bit, name_of
from quantization.quantizers import PackedWeight, Quantizer, flat_bytes, pack_weight

STORAGE = torch.float32


def as_storage(data: torch.Tensor) -> torch.Tensor:
    """data's bytes as a 1-D tensor of STORAGE, zero-padded to a whole element."""
    raw = flat_bytes(data)
    return F.pad(raw, (0, -raw.numel() % STORAGE.itemsize)).view(STORAGE)


class Packed(nn.Module):
    """A module whose parameters are made from the checkpoint's tensors, or from nothing, rather than being
    them. The streaming load asks each module through these methods; the defaults change nothing."""

    def packs(self, name: str) -> tuple[str, ...]:
        """The parameters, by name below this module, that the checkpoint's tensor `name` makes."""
        return (name,)

    def quantizer_of(self, name: str) -> Quantizer | None:
        """What packs that tensor, if anything does."""
        return None

    def pack(self, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
        """Their full contents, from the full tensor, packed already or not. Keys as in `packs`."""
        assert isinstance(tensor, torch.Tensor)
        return {name: tensor}

    def initial_values(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Full contents of the parameters that no checkpoint holds, on the CPU, the same on every rank."""
        return {}

    def fill_buffers(self, device: torch.device) -> None:
        """Puts in place what is neither in a checkpoint nor trained."""


def packs(module: nn.Module, name: str) -> tuple[str, ...]:
    """`Packed.packs`, also for a plain module: its parameters are the checkpoint's tensors."""
    return module.packs(name) if isinstance(module, Packed) else (name,)


def pack(module: nn.Module, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
    """`Packed.pack`, also for a plain module."""
    if isinstance(module, Packed):
        return module.pack(name, tensor)
    assert isinstance(tensor, torch.Tensor)
    return {name: tensor}


def quantizer_of(module: nn.Module, name: str) -> Quantizer | None:
    """`Packed.quantizer_of`, also for a plain module."""
    return module.quantizer_of(name) if isinstance(module, Packed) else None


class Linear4bit(Packed):
    """A frozen linear layer with a packed weight in float storage: [T, I] -> [T, O] in x's dtype.

    dtype: of the dequantized weight. Takes the place of `linear`, keeps its bias, and is made on its device
    (meta).
    """

    codes: nn.Parameter
    scales: nn.Parameter
    table: torch.Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, quantizer: Quantizer):
        super().__init__()
        self.out_features, self.in_features = self.shape = tuple(linear.weight.shape)
        self.dtype, self.quantizer, device = dtype, quantizer, linear.weight.device
        self.quantizer_name = name_of(quantizer)
        for name, n_bytes in zip(("codes", "scales"), quantizer.sizes(self.shape), strict=True):
            data = torch.empty(-(-n_bytes // STORAGE.itemsize), dtype=STORAGE, device=device)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)  # the operator has no gradient for it
        self.register_buffer("table", None, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized [O, I] weight, made anew at each access. Only inside a gathered FSDP unit."""
        return self.unpack(self.codes, self.scales)

    @property
    def takes_row_scale(self) -> bool:
        """Whether a row is whole blocks, whose scales can carry the row's."""
        return self.in_features % self.quantizer.block == 0

    def forward(
        self,
        x: torch.Tensor,
        row_scale: torch.Tensor | None = None,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
        dropout: float = 0.0,
        keep: bool = False,
    ) -> torch.Tensor:
        """x (diag(g) W)^T + bias + dropout(x) a^T b^T. row_scale: g [O] fp32, or None for ones; a [R, I], b [O, R]: a
        low-rank branch, or None; keep: `linear4bit`'s."""
        assert row_scale is None or self.bias is None, "a bias is not rescaled"
        x = x.to(compute_dtype(x))
        packed, h = (self.codes, self.scales, self.table, self.quantizer_name, self.shape), None
        if a is not None and b is not None:
            a, b = a.to(x.dtype), b.to(x.dtype)
            if dropout:
                h, a = F.linear(F.dropout(x, dropout), a), None
            else:
                with torch.no_grad():  # the operator differentiates by way of h
                    h = F.linear(x, a)
        bias = None if self.bias is None else self.bias.to(x.dtype)  # fp32 under autocast
        return linear4bit(x, *packed, row_scale, bias, h, a, b, keep)

    def packs(self, name: str) -> tuple[str, ...]:
        return ("codes", "scales") if name == "weight" else (name,)

    def quantizer_of(self, name: str) -> Quantizer | None:
        return self.quantizer if name == "weight" else None

    def pack(self, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
        """A weight [O, I] is quantized from the dtype in which it is stored, on the device where it is."""
        if name != "weight":
            return super().pack(name, tensor)
        packed = pack_weight(name, tensor, self.quantizer)
        assert isinstance(packed, PackedWeight)
        return {"codes": as_storage(packed.codes), "scales": as_storage(packed.scales)}

    def unpack(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The [O, I] weight of what `pack` returned, in the layer's dtype."""
        return dequantize((codes, scales, self.table), self.quantizer_name, self.shape, self.dtype)

    def fill_buffers(self, device: torch.device) -> None:
        self.table = self.quantizer.table(device)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.quantizer}"


def quantize_linears(model: nn.Module, quantizers: dict[str, Quantizer], dtype: torch.dtype) -> None:
    """Puts a Linear4bit that computes in `dtype` in the place of each named linear of a meta model."""
    for name, quantizer in quantizers.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, Linear4bit(linear, dtype, quantizer))
