"""NF4 with double quantization -> weights in one Triton kernel. bitsandbytes takes three (the scales' codes,
their offset, the weights) and twice the time; the result is the same, bit for bit (tests/gpu/test_layers.py).

Imported only where there is a GPU that Triton supports.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
import triton
import triton.language as tl

WORD = tl.constexpr(8)  # weights of four bytes of codes, which a thread takes at once: 16 bytes of results
BLOCK = tl.constexpr(64 // 8)  # words that share a scale
GROUP = tl.constexpr(256 * 64 // 8)  # words whose scales share a second-level scale
WORDS = 256  # of a program: part of one group


@triton.jit
def _dequantize(
    codes,
    scales,
    scale_values,
    values,
    row_scale,
    out,
    n_words,
    words_of_row,
    gap,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_GAP: tl.constexpr,
    WORDS: tl.constexpr,
):
    first, word = tl.program_id(0).to(tl.int64) * WORDS, tl.arange(0, WORDS)
    inside = first + word < n_words
    n_groups = tl.cdiv(n_words, GROUP)
    group_scales, scale_codes = scales.to(tl.pointer_type(tl.float32)), scales + (n_groups + 1) * 4
    scale_code = tl.load(scale_codes + first // BLOCK + word // BLOCK, inside, 0).to(tl.int32)
    scale = tl.load(scale_values + scale_code) * tl.load(group_scales + first // GROUP)
    scale = scale + tl.load(group_scales + n_groups)
    if HAS_ROW_SCALE:
        scale = scale * tl.load(row_scale + (first + word) // words_of_row, inside, 0.0)
    code = tl.load(codes.to(tl.pointer_type(tl.int32)) + first + word, inside, 0)
    offset = tl.arange(0, WORD)[None, :]
    index = (code[:, None] >> ((offset ^ 1) * 4)) & 15  # the high half of a byte comes first
    weights = tl.load(values + index) * scale[:, None]
    at = (word * WORD)[:, None] + offset
    if HAS_GAP:
        at += ((first + word) // words_of_row * gap)[:, None]
    tl.store(out + first * WORD + at, weights.to(out.dtype.element_ty), inside[:, None])


_VALUES: dict[torch.device, torch.Tensor] = {}


def _values(device: torch.device) -> torch.Tensor:
    """The 16 values of a code, fp32."""
    if device not in _VALUES:
        _VALUES[device] = bnb.get_4bit_type("nf4", device=device)
    return _VALUES[device]


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    scale_values: torch.Tensor,
    row_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fills out, the [O, I] weight, for O I a multiple of 64, and returns it. codes [O I / 2 or more], aligned to four
    bytes, and scales uint8, as NF4 in nf4.py has them; scale_values [256], row_scale [O] fp32 (row_scale, and
    rows that lie apart: I a multiple of 64).

    The kernel takes the scales apart by itself: views of them, made in Python, cost the host half as much as the launch."""
    n_words = out.numel() // 8
    # No fused multiply-add: bitsandbytes rounds the product before it adds the offset.
    _dequantize[(triton.cdiv(n_words, WORDS),)](
        codes,
        scales,
        scale_values,
        _values(codes.device),
        row_scale if row_scale is not None else scale_values,
        out,
        n_words,
        max(1, out.shape[1] // 8),
        out.stride(0) - out.shape[1],
        HAS_ROW_SCALE=row_scale is not None,
        HAS_GAP=out.stride(0) != out.shape[1],
        WORDS=WORDS,
        num_warps=2,
        enable_fp_fusion=False,
    )
    return out
