"""What all quantizers have in common: the interface `Quantizer`, and a checkpoint's tensor packed by one.

A quantizer turns a weight into codes and scales, flat bytes, and back. The layer that stores the bytes
(quantization/layer.py) and the load (quantize_layers.py) do not know which quantizer it is. There are two:
NF4 (quantization/nf4.py) and HQQ (quantization/hqq.py).

Shapes: O output features, I input features; a block is `block` consecutive weights of the flattened [O, I]
that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from options.errors import UserError


class Quantizer(Protocol):
    """A frozen value: equal ones pack equal weights into equal bytes."""

    @property
    def block(self) -> int: ...

    @property
    def library(self) -> str:
        """The package that packs."""

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of weights that it packs."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be packed."""

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(bytes of codes, bytes of scales)."""

    def table(self, device: torch.device) -> torch.Tensor | None:
        """The constant that `dequantize` reads, one per device for all layers."""

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, scales), uint8, 1-D, of a weight [O, I] of one of `dtypes`, on the device where it is. Raises ValueError
        for what cannot be packed."""

    def dequantize(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        table: torch.Tensor | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        row_scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The [O, I] weight in `dtype`. row_scale [O] fp32 multiplies each row, by way of its blocks' scales:
        no extra pass over the weight. out: where it is put, of that shape and dtype, whose rows may lie apart. Both
        need whole blocks in a row: I a multiple of `block`."""


@dataclass(frozen=True)
class PackedWeight:
    """What a quantizer made of a weight: codes and scales, uint8, 1-D."""

    codes: torch.Tensor
    scales: torch.Tensor

    def to(self, device: torch.device) -> PackedWeight:
        return PackedWeight(self.codes.to(device), self.scales.to(device))


def pack_weight(
    where: str, tensor: torch.Tensor | PackedWeight, quantizer: Quantizer | None
) -> torch.Tensor | PackedWeight:
    """A checkpoint's tensor, packed if it is to be and is not yet. where: its file and its name. Raises UserError."""
    if quantizer is None or isinstance(tensor, PackedWeight):
        return tensor
    try:
        return PackedWeight(*quantizer.quantize(tensor))
    except ValueError as e:
        raise UserError(f"{where} {e}") from None


def flat_bytes(*tensors: torch.Tensor) -> torch.Tensor:
    """The tensors' bytes one after another: uint8, 1-D."""
    return torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])


def put(weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return weight if out is None else out.copy_(weight)
