"""The interface of all quantizers, `Quantizer`, and a weight that one has packed, `PackedWeight`.

A quantizer converts a weight to codes and scales, flat bytes, and back. The layer that stores the bytes
(quantization/layer.py) and the load (quantize_layers.py) work with any quantizer. There are two: NF4
(quantization/nf4.py) and HQQ (quantization/hqq.py).

Shapes: O output features, I input features; a block is `block` consecutive weights of the flattened [O, I]
that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Quantizer(Protocol):
    """The abstract interface: a frozen value. Equal quantizers pack equal weights into equal bytes."""

    @property
    def block(self) -> int:
        """Number of consecutive weights that share a scale."""

    @property
    def library(self) -> str:
        """Name of the package that packs."""

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the weights that `quantize` takes."""

    @property
    def has_4bit_blocks_of_64(self) -> bool:
        """Whether quantization/rounded_kernel.py can read its format."""

    def code_values(self, device: torch.device) -> torch.Tensor | None:
        """Abstract. Return what the codes stand for before scaling, [16] fp32; None if that is the code."""

    def can_pack(self, shape: tuple[int, ...]) -> bool:
        """Abstract. Return whether a weight of this shape can be packed."""

    def packed_sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Abstract. Return (number of bytes of codes, of scales) for a weight of this shape."""

    def table(self, device: torch.device) -> torch.Tensor | None:
        """Abstract. Return `dequantize`'s constant table, one for all layers; None if it needs none (HQQ)."""

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Abstract. Pack a weight [O, I] into (codes, scales), flat uint8. ValueError (HQQ) beyond fp16.

        On the weight's device; its dtype is one of `dtypes`. HQQ raises ValueError for NaN, infinity, and a
        scale or zero point beyond fp16; NF4 packs anything.
        """

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
        """Abstract. Return the weight [O, I] of codes and scales, flat uint8 bytes, in `dtype`.

        row_scale and out need whole blocks in each row: I a multiple of `block`.

        Args:
            codes, scales: uint8, 1-D, maybe with padding at the end.
            table: of `table`, on their device.
            shape: (O, I).
            dtype: of the result.
            row_scale: [O] fp32, multiplied into each row by way of its blocks' scales, without an extra pass.
            out: [O, I] in `dtype`, filled and returned. There may be gaps between its rows.
        """

    def block_bounds(
        self, scales: torch.Tensor, table: torch.Tensor | None, shape: tuple[int, int]
    ) -> torch.Tensor:
        """Abstract. Return an upper bound of the absolute values of each block: [blocks] fp32.

        scales, table, shape: as for `dequantize`.
        """

    def dequantize_stack(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        table: torch.Tensor | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Abstract. Return weights that were packed alone, each as `dequantize` does: [M, O, I].

        Args:
            codes, scales: [M, bytes of one, with padding] uint8.
            table: as for `dequantize`.
            shape: (O, I), of one.
            dtype: of the result.
        """


@dataclass(frozen=True)
class PackedWeight:
    """A quantizer's result for a weight: codes and scales, uint8, 1-D."""

    codes: torch.Tensor
    scales: torch.Tensor

    def to(self, device: torch.device) -> PackedWeight:
        return PackedWeight(self.codes.to(device), self.scales.to(device))


def flat_bytes(*tensors: torch.Tensor) -> torch.Tensor:
    """Return the concatenated bytes of the tensors: uint8, 1-D."""
    return torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])


def copy_into(out: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """Copy the weight into `out` and return that; without `out`, return the weight."""
    return weight if out is None else out.copy_(weight)
