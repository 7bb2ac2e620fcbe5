"""Dequantize NF4 with double quantization in one Triton kernel.

bitsandbytes runs three kernels (the scales' codes, their offset, the weights) and takes twice the time; the
result is the same, bit for bit (tests/gpu/test_layers.py). Imported only where there is a GPU that Triton
supports.

Shapes: O output features, I input features.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
import triton
import triton.language as tl

WORD = tl.constexpr(8)  # weights that a thread computes at once: 4 bytes of codes, 16 bytes of 16-bit results
BLOCK = tl.constexpr(64 // 8)  # words that share a scale
GROUP = tl.constexpr(256 * 64 // 8)  # words whose scales share a second-level scale
WORDS = 256  # words of a program, a part of one group


# As `dequantize`, with the values of codes, n_words of the weight, words_of_row, and gap: elements between
# the rows of out. Of a stack, a program's second index is its weight; code_stride and scale_stride are the
# bytes from one weight's codes and scales to the next one's.
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
    code_stride,
    scale_stride,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_GAP: tl.constexpr,
    IS_STACK: tl.constexpr,
    WORDS: tl.constexpr,
):
    if IS_STACK:
        member = tl.program_id(1).to(tl.int64)
        codes += member * code_stride
        scales += member * scale_stride
        out += member * n_words * WORD
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
    index = (code[:, None] >> ((offset ^ 1) * 4)) & 15  # the high half of a byte is the first
    weights = tl.load(values + index) * scale[:, None]
    position = (word * WORD)[:, None] + offset
    if HAS_GAP:
        position += ((first + word) // words_of_row * gap)[:, None]
    tl.store(out + first * WORD + position, weights.to(out.dtype.element_ty), inside[:, None])


_VALUES: dict[torch.device, torch.Tensor] = {}


def nf4_values(device: torch.device) -> torch.Tensor:
    """Return the 16 weights that the 4-bit codes stand for before scaling: fp32, on the device (cached)."""
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
    """Fill `out` with the dequantized weight and return it. O I must be a multiple of 64.

    row_scale, and gaps between the rows of `out`, need I to be a multiple of 64. The kernel splits `scales`
    itself: views of it, made in Python, would cost the host half as much as the launch.

    Args:
        codes: [O I / 2 or more] uint8, aligned to four bytes.
        scales: uint8, in the layout of NF4 (nf4.py).
        scale_values: [256] fp32, the values of the scales' 8-bit codes.
        row_scale: [O] fp32, or None.
        out: [O, I].
    """
    n_words = out.numel() // 8
    # No fused multiply-add: bitsandbytes rounds the product before it adds the offset.
    _dequantize[(triton.cdiv(n_words, WORDS),)](
        codes,
        scales,
        scale_values,
        nf4_values(codes.device),
        row_scale if row_scale is not None else scale_values,
        out,
        n_words,
        max(1, out.shape[1] // 8),
        out.stride(0) - out.shape[1],
        0,
        0,
        HAS_ROW_SCALE=row_scale is not None,
        HAS_GAP=out.stride(0) != out.shape[1],
        IS_STACK=False,
        WORDS=WORDS,
        num_warps=2,
        enable_fp_fusion=False,
    )
    return out


def dequantize_stack(
    codes: torch.Tensor, scales: torch.Tensor, scale_values: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Fill `out` [M, O, I] with M dequantized weights, each packed alone, and return it.

    Args:
        codes: [M, bytes] uint8, each weight's aligned to four bytes.
        scales: [M, bytes] uint8, each weight's in the layout of NF4, aligned to four bytes.
        scale_values: as for `dequantize`.
        out: [M, O, I], contiguous. O I must be a multiple of 64.
    """
    n_words = out[0].numel() // 8
    _dequantize[(triton.cdiv(n_words, WORDS), len(out))](
        codes,
        scales,
        scale_values,
        nf4_values(codes.device),
        scale_values,
        out,
        n_words,
        max(1, out.shape[2] // 8),
        0,
        codes.stride(0),
        scales.stride(0),
        HAS_ROW_SCALE=False,
        HAS_GAP=False,
        IS_STACK=True,
        WORDS=WORDS,
        num_warps=2,
        enable_fp_fusion=False,
    )
    return out
