"""HQQ's codes -> weights in one Triton kernel, for any number of bits. The result is that of the plain operations in
quantizers.py, bit for bit (tests/test_gpu_modes.py).

Imported only where there is a GPU that Triton supports.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

WEIGHTS = 2048  # of a program


@triton.jit
def _dequantize(
    codes,
    scales,
    zeros,
    row_scale,
    out,
    n_weights,
    columns,
    gap,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_GAP: tl.constexpr,
    PER_WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    WORDS: tl.constexpr,
):
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = word * PER_WORD < n_weights
    bits = tl.zeros((WORDS,), tl.int32)
    for i in tl.static_range(WORD_BYTES):
        bits |= tl.load(codes + word * WORD_BYTES + i, inside, 0).to(tl.int32) << (8 * i)
    place = tl.arange(0, PER_WORD)[None, :]
    code = ((bits[:, None] >> (place * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
    at, inside = word[:, None] * PER_WORD + place, inside[:, None]
    scale = tl.load(scales + at // BLOCK, inside, 0.0).to(tl.float32)
    if HAS_ROW_SCALE:
        scale = scale * tl.load(row_scale + at // columns, inside, 0.0)
    weight = (code - tl.load(zeros + at // BLOCK, inside, 0.0).to(tl.float32)) * scale
    if HAS_GAP:
        at += at // columns * gap
    tl.store(out + at, weight.to(out.dtype.element_ty), inside)


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    n_bits: int,
    block: int,
    row_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fills out, the [O, I] weight, whose rows may lie apart, and returns it. codes: uint8, n_bits of each weight in a
    stream, lowest bits first; scales, zeros [O I / block] fp16; row_scale [O] fp32 or None."""
    per_word = 8 // math.gcd(n_bits, 8)
    words = WEIGHTS // per_word
    _dequantize[(triton.cdiv(out.numel(), WEIGHTS),)](
        codes,
        scales,
        zeros,
        row_scale if row_scale is not None else scales,
        out,
        out.numel(),
        out.shape[1],
        out.stride(0) - out.shape[1],
        BITS=n_bits,
        BLOCK=block,
        HAS_ROW_SCALE=row_scale is not None,
        HAS_GAP=out.stride(0) != out.shape[1],
        PER_WORD=per_word,
        WORD_BYTES=per_word * n_bits // 8,
        WORDS=words,
    )
    return out
