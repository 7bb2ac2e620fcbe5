"""HQQ, half-quadratic quantization with 8, 4, 3 or 2 bits, and its codes as a stream of bits.

The hqq library computes the codes. On GPUs that Triton supports, a Triton kernel (quantization/hqq_kernel.py)
dequantizes them; elsewhere plain operations do, with the same result.

Shapes: a weight [O, I], flattened, is `blocks` blocks of `block` weights; each has one scale and one zero
point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from launch.devices import triton_runs_on
from quantization.quantizers import copy_into, flat_bytes

CHUNK_WEIGHTS = 2**22  # weights that plain operations dequantize at a time


@dataclass(frozen=True)
class HQQ:
    """Half-quadratic quantization (https://mobiusml.github.io/hqq_blog), by the hqq library's Quantizer.

    Along the rows (axis 1): W = (code - zero) * scale, with one fp16 scale and one fp16 zero point per block.

    codes: a stream of `n_bits` each, the first weight in the lowest bits. With 3 bits, eight weights take
    three bytes; in hqq's own packing they take 3.2. scales: all scales, then all zero points. Both are stored
    in fp16, as hqq computes them on a GPU; dequantization computes in fp32 and rounds once.
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

    @property
    def has_4bit_blocks_of_64(self) -> bool:
        return self.n_bits == 4 and self.block == 64

    def code_values(self, device: torch.device) -> None:
        return None

    def can_pack(self, shape: tuple[int, ...]) -> bool:
        return math.prod(shape) % self.block == 0

    def packed_sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return math.prod(shape) * self.n_bits // 8, math.prod(shape) // self.block * 4

    def table(self, device: torch.device) -> None:
        return None

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (codes, scales) by hqq. ValueError: NaN, infinity, a scale or zero point beyond fp16."""
        from hqq.core.quantize import Quantizer as Library  # a slow import, which only some train types need

        codes, meta = Library.quantize(
            weight, nbits=self.n_bits, group_size=self.block, axis=1, bitpack=False, device=str(weight.device)
        )
        scale, zero = meta["scale"].half(), meta["zero"].half()
        if not (scale.isfinite() & zero.isfinite()).all():
            if not weight.isfinite().all():
                raise ValueError("holds NaN or infinity")
            # For example weights near 4.5 that differ by a thousandth.
            why = "lie too far from 0, and too close together, for HQQ's fp16 zero points"
            raise ValueError(f"has a block whose weights {why}")
        return pack_bits(codes, self.n_bits), flat_bytes(scale, zero)

    def dequantize(self, codes, scales, table, shape, dtype, row_scale=None, out=None) -> torch.Tensor:
        """Return the weight as `Quantizer` says, by the Triton kernel if it runs here, or in plain torch.

        Args:
            codes, scales: uint8, 1-D, maybe with padding at the end; see the class for the layout.
            table: not used.
            shape, dtype, row_scale, out: as for `Quantizer.dequantize`.
        """
        code_bytes, scale_bytes = self.packed_sizes(shape)
        codes, (scale, zero) = codes[:code_bytes], scales[:scale_bytes].view(torch.float16).chunk(2)
        if triton_runs_on(codes.device):
            from quantization.hqq_kernel import dequantize  # Triton comes with torch's CUDA builds only

            out = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
            return dequantize(codes, scale, zero, self.n_bits, self.block, row_scale, out)
        scale, zero = scale.float(), zero.float()
        if row_scale is not None:
            scale = (scale.view(shape[0], -1) * row_scale[:, None]).view(-1)
        weight = _dequantize(codes, scale, zero, self.n_bits, self.block, dtype)
        return copy_into(out, weight.view(shape))

    def block_bounds(self, scales, table, shape) -> torch.Tensor:
        scale, zero = scales[: self.packed_sizes(shape)[1]].view(torch.float16).float().chunk(2)
        return scale.abs() * torch.maximum(zero.abs(), (2**self.n_bits - 1 - zero).abs())

    def dequantize_stack(self, codes, scales, table, shape, dtype) -> torch.Tensor:
        """Return the weights as `Quantizer` says, in one Triton kernel where `dequantize` is one."""
        if triton_runs_on(codes.device):
            from quantization.hqq_kernel import dequantize_stack

            out = torch.empty(len(codes), *shape, dtype=dtype, device=codes.device)
            return dequantize_stack(codes, scales, self.n_bits, self.block, out)
        members = zip(codes, scales, strict=True)
        return torch.stack([self.dequantize(*member, table, shape, dtype) for member in members])


def _word_size(n_bits: int) -> tuple[int, int]:
    """Return (number of codes, number of bytes) of a word: the shortest run of bytes with whole codes."""
    codes = 8 // math.gcd(n_bits, 8)
    return codes, codes * n_bits // 8


def pack_bits(codes: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Pack integers from 0 to 2^n_bits - 1, in any dtype, into a stream of n_bits each: uint8, 1-D.

    Their number must be a multiple of the codes of a word.
    """
    per_word, word_bytes = _word_size(n_bits)
    shifts = torch.arange(per_word, device=codes.device) * n_bits
    words = (codes.reshape(-1, per_word).to(torch.int32) << shifts).sum(1, dtype=torch.int32)
    parts = words[:, None] >> (8 * torch.arange(word_bytes, device=codes.device))
    return (parts & 255).to(torch.uint8).view(-1)


def _dequantize(codes, scale, zero, n_bits: int, block: int, dtype: torch.dtype) -> torch.Tensor:
    """Return (code - zero) * scale of every weight, [blocks, block], in plain operations.

    In chunks: the intermediate results take up to 12 bytes per weight, most of a GiB for a large weight.

    Args:
        codes: uint8, 1-D, without padding.
        scale, zero: [blocks] fp32.
        n_bits, block: as in HQQ.
        dtype: of the result.
    """
    weight = torch.empty(len(scale), block, dtype=dtype, device=codes.device)
    step = max(CHUNK_WEIGHTS // block, 1)  # blocks
    for first in range(0, len(weight), step):
        blocks = slice(first, first + step)
        chunk = codes[first * block * n_bits // 8 : (first + step) * block * n_bits // 8]
        values = _unpack_bits(chunk, n_bits).view(-1, block).float()
        weight[blocks] = values.sub_(zero[blocks, None]).mul_(scale[blocks, None])
    return weight


def _unpack_bits(stream: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Return the integers that `pack_bits` packed into `stream`: int32, [words, codes of a word]."""
    per_word, word_bytes = _word_size(n_bits)
    words = stream.view(-1, word_bytes).to(torch.int32)
    word = words[:, 0]
    for i in range(1, word_bytes):
        word = word | words[:, i] << 8 * i
    shifts = torch.arange(per_word, device=stream.device, dtype=torch.int32) * n_bits
    return (word[:, None] >> shifts) & (2**n_bits - 1)
