"""NF4 with double quantization -> weights in one Triton kernel. bitsandbytes takes three (the scales' codes, their
offset, the weights) and twice the time; the result is the same, bit for bit (tests/test_gpu.py).

Imported only where there is a GPU that Triton supports.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
import triton
import triton.language as tl

BLOCK = tl.constexpr(64)  # weights that share a scale: 32 bytes of codes
GROUP = tl.constexpr(256)  # scales that share a second-level scale
BLOCKS = 64  # of a program


@triton.jit
def _dequantize(
    codes,
    scales,
    scale_values,
    values,
    row_scale,
    out,
    n_blocks,
    blocks_of_row,
    gap,
    HAS_ROW_SCALE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < n_blocks
    n_groups = tl.cdiv(n_blocks, GROUP)
    group_scales, scale_codes = scales.to(tl.pointer_type(tl.float32)), scales + (n_groups + 1) * 4
    scale = tl.load(scale_values + tl.load(scale_codes + block, inside, 0).to(tl.int32))
    scale = scale * tl.load(group_scales + block // GROUP, inside, 0.0) + tl.load(group_scales + n_groups)
    if HAS_ROW_SCALE:
        scale = scale * tl.load(row_scale + block // blocks_of_row, inside, 0.0)
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    pair = tl.load(codes + byte, inside[:, None], 0).to(tl.int32)
    first, second = tl.load(values + (pair >> 4)), tl.load(values + (pair & 15))  # the high half comes first
    weights = tl.reshape(tl.join(first, second), (BLOCKS, BLOCK)) * scale[:, None]
    at = (block * BLOCK + block // blocks_of_row * gap)[:, None] + tl.arange(0, BLOCK)[None, :]
    tl.store(out + at, weights.to(out.dtype.element_ty), inside[:, None])


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
    """Fills out, the [O, I] weight, for O I a multiple of 64, and returns it. codes [O I / 2 or more] and scales uint8, as
    quantizers.NF4 has them; scale_values [256], row_scale [O] fp32 (row_scale, and rows that lie apart: I a multiple of
    64).

    The kernel takes the scales apart by itself: views of them, made in Python, cost the host half as much as the launch."""
    n_blocks = out.numel() // 64
    # No fused multiply-add: bitsandbytes rounds the product before it adds the offset.
    _dequantize[(triton.cdiv(n_blocks, BLOCKS),)](
        codes,
        scales,
        scale_values,
        _values(codes.device),
        row_scale if row_scale is not None else scale_values,
        out,
        n_blocks,
        max(1, out.shape[1] // 64),
        out.stride(0) - out.shape[1],
        HAS_ROW_SCALE=row_scale is not None,
        BLOCKS=BLOCKS,
        enable_fp_fusion=False,
    )
    return out
