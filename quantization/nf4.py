"""NF4 with double quantization, the 4-bit format of QLoRA, as bitsandbytes packs it.

bitsandbytes computes the codes. A Triton kernel (quantization/nf4_kernel.py) makes weights of them on GPUs
that Triton supports; elsewhere bitsandbytes' own operations do, with the same result.

Shapes: a weight [O, I], flattened, is `blocks` blocks of 64 weights; each has one scale, its absolute
maximum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import bitsandbytes.functional as bnb
import torch

from launch.devices import triton_runs_on
from quantization.quantizers import flat_bytes, put

SCALE_BLOCK = 256  # NF4 scales that share a second-level scale: bitsandbytes' default


@cache
def _dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 values of an 8-bit scale code, fp32."""
    return bnb.create_dynamic_map().to(device)


@dataclass(frozen=True)
class NF4:
    """QLoRA's NormalFloat-4 with double quantization (arXiv 2305.14314, section 3), by bitsandbytes.

    codes: two a byte. scales: per 256 blocks one fp32 scale, one fp32 offset for the whole tensor, and per
    block one 8-bit code of its absolute maximum; without double quantization the absolute maxima themselves, in
    fp32 (some checkpoints are so packed; we never do). Dequantized weights are bitsandbytes' own, bit for bit.
    """

    block: ClassVar[int] = 64
    library: ClassVar[str] = "bitsandbytes"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16, torch.bfloat16)
    double: bool = True

    def fits(self, shape: tuple[int, ...]) -> bool:
        return True  # the last block may be part of one

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        blocks = -(-math.prod(shape) // self.block)
        scales = 4 * -(-blocks // SCALE_BLOCK) + 4 + blocks if self.double else 4 * blocks
        return -(-math.prod(shape) // 2), scales

    def table(self, device: torch.device) -> torch.Tensor:
        return _dynamic_map(device)

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.double
        codes, state = bnb.quantize_4bit(
            weight.contiguous(), blocksize=self.block, compress_statistics=True, quant_type="nf4"
        )
        assert state.state2.blocksize == SCALE_BLOCK
        return flat_bytes(codes), flat_bytes(state.state2.absmax, state.offset.view(1), state.absmax)

    def dequantize(self, codes, scales, table, shape, dtype, row_scale=None, out=None) -> torch.Tensor:
        if self.double and math.prod(shape) % self.block == 0 and triton_runs_on(codes.device):
            from quantization.nf4_kernel import dequantize  # Triton comes with torch's CUDA builds only

            out = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
            return dequantize(codes, scales, table, row_scale, out)
        absmax = self._absmax(scales, table, -(-shape[0] * shape[1] // self.block))
        if row_scale is not None:
            absmax = (absmax.view(shape[0], -1) * row_scale[:, None]).view(-1)
        packed = codes[: -(-shape[0] * shape[1] // 2)].view(-1, 1)
        # Blocks that cross rows: bitsandbytes' kernel for CPUs with AVX-512 begins a new one with each row, so it gets
        # a single row there.
        rows = shape if shape[1] % self.block == 0 else (1, shape[0] * shape[1])
        weight = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, self.block, "nf4", rows, dtype)
        return put(weight.view(shape), out)

    def _absmax(self, scales: torch.Tensor, table: torch.Tensor, blocks: int) -> torch.Tensor:
        """The blocks' absolute maxima: [blocks] fp32."""
        if not self.double:
            return scales[: 4 * blocks].view(torch.float32)
        codes, group_scales, offset = self._parts(scales, blocks)
        return offset + torch.ops.bitsandbytes.dequantize_blockwise(
            codes, group_scales, table, SCALE_BLOCK, torch.float32
        )

    def _parts(self, scales: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of double quantization: (the blocks' 8-bit codes, their groups' scales, the offset)."""
        groups = -(-blocks // SCALE_BLOCK)
        group_scales, offset = scales[: 4 * groups + 4].view(torch.float32).split([groups, 1])
        return scales[4 * groups + 4 : 4 * groups + 4 + blocks], group_scales, offset
