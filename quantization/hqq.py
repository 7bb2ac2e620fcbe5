"""HQQ, half-quadratic quantization with 8, 4, 3 or 2 bits, and its codes as a stream of bits.

The hqq library computes the codes. A Triton kernel (quantization/hqq_kernel.py) makes weights of them on GPUs
that Triton supports; elsewhere plain operations do, with the same result.

Shapes: a weight [O, I], flattened, is `blocks` blocks of `block` weights; each has one scale and one zero
point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from launch.devices import triton_runs_on
from quantization.quantizers import flat_bytes, put

EXPANDED = 2**22  # weights that plain operations expand at a time


@dataclass(frozen=True)
class HQQ:
    """Half-quadratic quantization (https://mobiusml.github.io/hqq_blog), by the hqq library's Quantizer along
    the rows (axis 1): W = (code - zero) * scale, per block one fp16 scale and one fp16 zero point.

    codes: a stream of `n_bits` each, the first weight in the lowest bits: three bits are eight weights in three
    bytes, where hqq's own packing takes 3.2. scales: all scales, then all zero points. What hqq computes in
    fp16 on a GPU is kept as it is; dequantization computes in fp32 and rounds once.
    """

    n_bits: int
    block: int = 64
    library: ClassVar[str] = "hqq"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
    )

    def fits(self, shape: tuple[int, ...]) -> bool:
        return math.prod(shape) % self.block == 0

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return math.prod(shape) * self.n_bits // 8, math.prod(shape) // self.block * 4

    def table(self, device: torch.device) -> None:
        return None

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from hqq.core.quantize import Quantizer as Library  # only these train types pay for its import

        codes, meta = Library.quantize(
            weight, nbits=self.n_bits, group_size=self.block, axis=1, bitpack=False, device=str(weight.device)
        )
        scale, zero = meta["scale"].half(), meta["zero"].half()
        if not (scale.isfinite() & zero.isfinite()).all():
            if not weight.isfinite().all():
                raise ValueError("holds NaN or infinity")
            # As of weights around 4.5 that differ by a thousandth.
            why = "lie too far from 0, and too close together, for HQQ's fp16 zero points"
            raise ValueError(f"has a block whose weights {why}")
        return pack_bits(codes, self.n_bits), flat_bytes(scale, zero)

    def dequantize(self, codes, scales, table, shape, dtype, row_scale=None, out=None) -> torch.Tensor:
        code_bytes, scale_bytes = self.sizes(shape)
        codes, (scale, zero) = codes[:code_bytes], scales[:scale_bytes].view(torch.float16).chunk(2)
        if triton_runs_on(codes.device):
            from quantization.hqq_kernel import dequantize  # Triton comes with torch's CUDA builds only

            out = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
            return dequantize(codes, scale, zero, self.n_bits, self.block, row_scale, out)
        scale, zero = scale.float(), zero.float()
        if row_scale is not None:
            scale = (scale.view(shape[0], -1) * row_scale[:, None]).view(-1)
        return put(_expand(codes, scale, zero, self.n_bits, self.block, dtype).view(shape), out)


def _word(n_bits: int) -> tuple[int, int]:
    """The smallest run of whole bytes that holds whole codes: (codes, bytes)."""
    codes = 8 // math.gcd(n_bits, 8)
    return codes, codes * n_bits // 8


def pack_bits(codes: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Whole numbers 0 to 2^n_bits - 1, in any dtype, as a stream of n_bits each: uint8, 1-D."""
    per_word, word_bytes = _word(n_bits)
    shifts = torch.arange(per_word, device=codes.device) * n_bits
    words = (codes.reshape(-1, per_word).to(torch.int32) << shifts).sum(1, dtype=torch.int32)
    parts = words[:, None] >> (8 * torch.arange(word_bytes, device=codes.device))
    return (parts & 255).to(torch.uint8).view(-1)


def _expand(codes, scale, zero, n_bits: int, block: int, dtype: torch.dtype) -> torch.Tensor:
    """(code - zero) * scale of every weight, [blocks, block]. codes: uint8, 1-D; scale, zero [blocks] fp32. Some at a time:
    on the way each takes up to 12 bytes, of a large weight as a whole most of a GiB."""
    weight = torch.empty(len(scale), block, dtype=dtype, device=codes.device)
    step = max(EXPANDED // block, 1)  # blocks
    for first in range(0, len(weight), step):
        blocks = slice(first, first + step)
        some = codes[first * block * n_bits // 8 : (first + step) * block * n_bits // 8]
        values = _values(some, n_bits).view(-1, block).float()
        weight[blocks] = values.sub_(zero[blocks, None]).mul_(scale[blocks, None])
    return weight


def _values(codes: torch.Tensor, n_bits: int) -> torch.Tensor:
    """The whole numbers of `pack_bits`: [bytes / word bytes, codes of a word] int32."""
    per_word, word_bytes = _word(n_bits)
    words = codes.view(-1, word_bytes).to(torch.int32)
    word = words[:, 0]
    for i in range(1, word_bytes):
        word = word | words[:, i] << 8 * i
    shifts = torch.arange(per_word, device=codes.device, dtype=torch.int32) * n_bits
    return (word[:, None] >> shifts) & (2**n_bits - 1)
