"""NF4 with double quantization, the 4-bit format of QLoRA, as bitsandbytes packs it.

bitsandbytes computes the codes. On GPUs that Triton supports, a Triton kernel (quantization/nf4_kernel.py)
dequantizes them; elsewhere bitsandbytes' own operations do, with the same result.

Shapes: a weight [O, I], flattened, is `blocks` blocks of 64 weights; each has one scale, its absolute
maximum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import ClassVar

import torch

from launch.devices import triton_runs_on
from quantization.quantizers import copy_into, flat_bytes

SCALE_BLOCK = 256  # NF4 scales that share a second-level scale: bitsandbytes' default


@cache
def _library() -> ModuleType:
    """Return bitsandbytes.functional, which also registers torch.ops.bitsandbytes.

    Its import takes most of a second, which plan.py, for instance, does not need.
    """
    import bitsandbytes.functional as bnb

    return bnb


@cache
def _dynamic_map(device: torch.device) -> torch.Tensor:
    """Return the fp32 values of the 256 8-bit codes that scales have (cached)."""
    return _library().create_dynamic_map().to(device)


@dataclass(frozen=True)
class NF4:
    """QLoRA's NormalFloat-4 with double quantization (arXiv 2305.14314, section 3), by bitsandbytes.

    codes: two per byte. scales: one fp32 scale per 256 blocks, one fp32 offset for the whole tensor, and one
    8-bit code per block for its absolute maximum. Without double quantization, scales are the absolute maxima
    in fp32; some checkpoints are packed like this. Dequantized weights equal bitsandbytes' own, bit for bit.
    """

    block: ClassVar[int] = 64
    library: ClassVar[str] = "bitsandbytes"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16, torch.bfloat16)
    double: bool = True

    @property
    def has_4bit_blocks_of_64(self) -> bool:
        return self.double

    def code_values(self, device: torch.device) -> torch.Tensor:
        from quantization.nf4_kernel import nf4_values

        return nf4_values(device)

    def can_pack(self, shape: tuple[int, ...]) -> bool:
        return True  # the last block may be a part of one

    def packed_sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return (bytes of codes, bytes of scales); see the class for the layout."""
        blocks = -(-math.prod(shape) // self.block)
        scales = 4 * -(-blocks // SCALE_BLOCK) + 4 + blocks if self.double else 4 * blocks
        return -(-math.prod(shape) // 2), scales

    def table(self, device: torch.device) -> torch.Tensor:
        return _dynamic_map(device)

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (codes, scales) by bitsandbytes, for any contents."""
        codes, state = _library().quantize_4bit(
            weight.contiguous(), blocksize=self.block, compress_statistics=self.double, quant_type="nf4"
        )
        if not self.double:
            return flat_bytes(codes), flat_bytes(state.absmax)
        assert state.state2.blocksize == SCALE_BLOCK
        return flat_bytes(codes), flat_bytes(state.state2.absmax, state.offset.view(1), state.absmax)

    def dequantize(self, codes, scales, table, shape, dtype, row_scale=None, out=None) -> torch.Tensor:
        """Return the weight as `Quantizer` says, by the Triton kernel if it supports it, or bitsandbytes.

        Args:
            codes, scales: uint8, 1-D, maybe with padding at the end; see the class for the layout.
            table: [256] fp32, the values of the 8-bit codes in doubly quantized scales.
            shape, dtype, row_scale, out: as for `Quantizer.dequantize`.
        """
        if self._has_kernel(shape, codes.device):
            from quantization.nf4_kernel import dequantize  # Triton comes with torch's CUDA builds only

            out = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
            return dequantize(codes, scales, table, row_scale, out)
        _library()
        absmax = self._decode_absmax(scales, table, -(-shape[0] * shape[1] // self.block))
        if row_scale is not None:
            absmax = (absmax.view(shape[0], -1) * row_scale[:, None]).view(-1)
        packed = codes[: -(-shape[0] * shape[1] // 2)].view(-1, 1)
        # If blocks cross rows, pass a single row: bitsandbytes' kernel for CPUs with AVX-512 begins a new
        # block with each row.
        rows = shape if shape[1] % self.block == 0 else (1, shape[0] * shape[1])
        weight = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, self.block, "nf4", rows, dtype)
        return copy_into(out, weight.view(shape))

    def block_bounds(self, scales, table, shape) -> torch.Tensor:
        _library()
        return self._decode_absmax(scales, table, -(-math.prod(shape) // self.block)).abs()

    def dequantize_stack(self, codes, scales, table, shape, dtype) -> torch.Tensor:
        """Return the weights as `Quantizer` says, in one Triton kernel where `dequantize` is one."""
        if self._has_kernel(shape, codes.device):
            from quantization.nf4_kernel import dequantize_stack

            out = torch.empty(len(codes), *shape, dtype=dtype, device=codes.device)
            return dequantize_stack(codes, scales, table, out)
        members = zip(codes, scales, strict=True)
        return torch.stack([self.dequantize(*member, table, shape, dtype) for member in members])

    def _has_kernel(self, shape: tuple[int, ...], device: torch.device) -> bool:
        return self.double and math.prod(shape) % self.block == 0 and triton_runs_on(device)

    def _decode_absmax(self, scales: torch.Tensor, table: torch.Tensor, blocks: int) -> torch.Tensor:
        """Return the blocks' absolute maxima, [blocks] fp32, from the bytes `scales`.

        scales: fp32, or codes if double. table: the codes' values; used only if double.
        """
        if not self.double:
            return scales[: 4 * blocks].view(torch.float32)
        codes, group_scales, offset = self._split_scales(scales, blocks)
        return offset + torch.ops.bitsandbytes.dequantize_blockwise(
            codes, group_scales, table, SCALE_BLOCK, torch.float32
        )

    def _split_scales(
        self, scales: torch.Tensor, blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split doubly quantized scales: (8-bit codes of blocks, fp32 scales of groups, fp32 offset [1])."""
        groups = -(-blocks // SCALE_BLOCK)
        header = 4 * (groups + 1)  # bytes before the codes
        group_scales, offset = scales[:header].view(torch.float32).split([groups, 1])
        return scales[header : header + blocks], group_scales, offset
