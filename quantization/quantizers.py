"""How a weight becomes codes and scales, and back: bitsandbytes' NF4, or HQQ with 8, 4, 3 or 2 bits.

One interface, `Quantizer`, over flat bytes; the layer that stores them (quantize_layers.py) and the load do not
know which one it is. Shapes: O output features, I input features; a block is `block` consecutive weights of
the flattened [O, I] that share a scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Protocol

import bitsandbytes.functional as bnb
import torch

from options.errors import UserError

SCALE_BLOCK = 256  # NF4 scales that share a second-level scale: bitsandbytes' default
EXPANDED = 2**22  # weights that plain operations expand at a time


class Quantizer(Protocol):
    """A frozen value: equal ones pack equal weights into equal bytes."""

    block: int
    library: str  # the package that packs
    dtypes: tuple[torch.dtype, ...]  # of weights that it packs

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether a weight of this shape can be packed."""

    def sizes(self, shape: tuple[int, int]) -> tuple[int, int]:
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
        shape: tuple[int, int],
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
    name: str, tensor: torch.Tensor | PackedWeight, quantizer: Quantizer | None
) -> torch.Tensor | PackedWeight:
    """A checkpoint's tensor, packed if it is to be and is not yet. Raises UserError, with its name."""
    if quantizer is None or isinstance(tensor, PackedWeight):
        return tensor
    try:
        return PackedWeight(*quantizer.quantize(tensor))
    except ValueError as e:
        raise UserError(f"{name}: {e}") from None


def make_quantizer(name: str, n_bits: int | None, block: int | None) -> Quantizer:
    """Of METHODS' "bnb" (its bits and blocks are fixed: None) or "hqq"."""
    return HQQ(n_bits, block) if name == "hqq" else NF4()


def flat_bytes(*tensors: torch.Tensor) -> torch.Tensor:
    """The tensors' bytes one after another: uint8, 1-D."""
    return torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])


@cache
def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton, and so torch.compile, supports this device: a GPU of compute capability 8.0 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


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

    def fits(self, shape: tuple[int, int]) -> bool:
        return True  # the last block may be part of one

    def sizes(self, shape: tuple[int, int]) -> tuple[int, int]:
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
        return _put(weight.view(shape), out)

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
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (*NF4.dtypes, torch.float64)

    def fits(self, shape: tuple[int, int]) -> bool:
        return math.prod(shape) % self.block == 0

    def sizes(self, shape: tuple[int, int]) -> tuple[int, int]:
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
        return _put(_expand(codes, scale, zero, self.n_bits, self.block, dtype).view(shape), out)


def _put(weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return weight if out is None else out.copy_(weight)


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
