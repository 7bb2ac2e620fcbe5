"""Dequantize HQQ's codes in one Triton kernel, for any number of bits.

The result equals that of the plain operations in quantization/hqq.py, bit for bit (tests/gpu/test_modes.py).
Imported only where there is a GPU that Triton supports.

Shapes: O output features, I input features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = tl.constexpr(8)  # weights that a thread computes at once; their codes are n_bits bytes
GROUPS = 256  # groups of a program

# Bits of a code -> (type that a group's codes are loaded in, bits of that type).
LOADED = {8: (tl.uint32, 32), 4: (tl.uint32, 32), 3: (tl.uint8, 8), 2: (tl.uint16, 16)}


# As `dequantize`, with n_groups of the weight, groups_of_row, and gap: elements between the rows of out. Of a
# stack, a program's second index is its weight; code_stride (bytes) and scale_stride (elements) lead from one
# weight to the next.
@triton.jit
def _dequantize(
    codes,
    scales,
    zeros,
    row_scale,
    out,
    n_groups,
    groups_of_row,
    gap,
    code_stride,
    scale_stride,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOADED: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_GAP: tl.constexpr,
    IS_STACK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    if IS_STACK:
        member = tl.program_id(1).to(tl.int64)
        codes += member * code_stride
        scales += member * scale_stride
        zeros += member * scale_stride
        out += member * n_groups * GROUP
    first, group = tl.program_id(0).to(tl.int64) * GROUPS, tl.arange(0, GROUPS)
    inside = first + group < n_groups
    LOADS: tl.constexpr = BITS * 8 // WIDTH
    parts = codes.to(tl.pointer_type(LOADED)) + first * LOADS
    bits = tl.zeros((GROUPS,), tl.int64 if BITS == 8 else tl.int32)
    for i in tl.static_range(LOADS):
        bits |= tl.load(parts + group * LOADS + i, inside, 0).to(bits.dtype) << (WIDTH * i)
    block = (first + group) // (BLOCK // GROUP)  # a block has whole groups
    scale = tl.load(scales + block, inside, 0.0).to(tl.float32)
    zero = tl.load(zeros + block, inside, 0.0).to(tl.float32)
    if HAS_ROW_SCALE:
        scale = scale * tl.load(row_scale + (first + group) // groups_of_row, inside, 0.0)
    offset = tl.arange(0, GROUP)[None, :]
    code = ((bits[:, None] >> (offset * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
    weights = (code - zero[:, None]) * scale[:, None]
    position = (group * GROUP)[:, None] + offset
    if HAS_GAP:
        position += ((first + group) // groups_of_row * gap)[:, None]
    tl.store(out + first * GROUP + position, weights.to(out.dtype.element_ty), inside[:, None])


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    n_bits: int,
    block: int,
    row_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill `out` with the dequantized weight and return it.

    row_scale, and gaps between the rows of `out`, need I to be a multiple of 8.

    Args:
        codes: uint8, a stream of n_bits per weight, lowest bits first, aligned to four bytes.
        scales, zeros: [O I / block] fp16.
        n_bits: 8, 4, 3 or 2.
        block: a multiple of 8.
        row_scale: [O] fp32, or None.
        out: [O, I].
    """
    n_groups = out.numel() // 8
    loaded, width = LOADED[n_bits]
    _dequantize[(triton.cdiv(n_groups, GROUPS),)](
        codes,
        scales,
        zeros,
        row_scale if row_scale is not None else scales,
        out,
        n_groups,
        max(1, out.shape[1] // 8),
        out.stride(0) - out.shape[1],
        0,
        0,
        BITS=n_bits,
        BLOCK=block,
        LOADED=loaded,
        WIDTH=width,
        HAS_ROW_SCALE=row_scale is not None,
        HAS_GAP=out.stride(0) != out.shape[1],
        IS_STACK=False,
        GROUPS=GROUPS,
        num_warps=2,
    )
    return out


def dequantize_stack(
    codes: torch.Tensor, scales: torch.Tensor, n_bits: int, block: int, out: torch.Tensor
) -> torch.Tensor:
    """Fill `out` [M, O, I] with M dequantized weights, each packed alone, and return it.

    Args:
        codes: [M, bytes] uint8, each weight's as for `dequantize`, aligned to four bytes.
        scales: [M, bytes] uint8: each weight's scales, then its zero points, in fp16.
        n_bits, block: as for `dequantize`.
        out: [M, O, I], contiguous. O I must be a multiple of 8.
    """
    n_groups, halves = out[0].numel() // 8, scales.view(torch.float16)
    loaded, width = LOADED[n_bits]
    _dequantize[(triton.cdiv(n_groups, GROUPS), len(out))](
        codes,
        halves,
        halves[:, out[0].numel() // block :],
        halves,
        out,
        n_groups,
        max(1, out.shape[2] // 8),
        0,
        codes.stride(0),
        halves.stride(0),
        BITS=n_bits,
        BLOCK=block,
        LOADED=loaded,
        WIDTH=width,
        HAS_ROW_SCALE=False,
        HAS_GAP=False,
        IS_STACK=True,
        GROUPS=GROUPS,
        num_warps=2,
    )
    return out
