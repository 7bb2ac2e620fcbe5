"""Triton kernels of the fp8 matmul: expand 4-bit weights to e4m3, and round the rows of activations.

A block of 64 weights has one scale, so it has only 16 different values. A thread rounds these once, and packs
them into four registers of four bytes each. The GPU's byte permutation then takes four weights at once from
these registers: its selectors are nibbles, as the codes are. Imported only where there is a GPU that Triton
supports.

Shapes: O output features, I input features, T tokens, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(64)  # weights that share a scale
WORDS = tl.constexpr(64 // 8)  # words of a block: eight codes are 32 bits
GROUP = tl.constexpr(256)  # blocks whose NF4 scales share a second-level scale
SMALLEST = tl.constexpr(2.0**-100)  # as in rounded.py

# Bytes $0 (codes 0 to 3 of word $6) and $1 (codes 4 to 7), from the 16 bytes of $2 to $5. A selector of
# `prmt` has three bits for eight bytes, so each half of the 16 is looked up; a code's highest bit chooses.
LOOKUP = tl.constexpr("""{
.reg .b32 s, k, m, a, b, o;
mov.b32 o, 0xFF00;
and.b32 s, $6, 0x77777777;
shr.u32 k, $6, 3;
and.b32 k, k, 0x11111111;
prmt.b32 a, $2, $3, s;
prmt.b32 b, $4, $5, s;
prmt.b32 m, o, o, k;
lop3.b32 $0, m, b, a, 0xCA;
shr.u32 s, s, 16;
shr.u32 k, k, 16;
prmt.b32 a, $2, $3, s;
prmt.b32 b, $4, $5, s;
prmt.b32 m, o, o, k;
lop3.b32 $1, m, b, a, 0xCA;
}""")

# $0 to $3: byte i of each of $4 to $7, for i = 0 to 3.
TRANSPOSE = tl.constexpr("""{
.reg .b32 p, q, r, s;
prmt.b32 p, $4, $5, 0x5140;
prmt.b32 q, $6, $7, 0x5140;
prmt.b32 r, $4, $5, 0x7362;
prmt.b32 s, $6, $7, 0x7362;
prmt.b32 $0, p, q, 0x5410;
prmt.b32 $1, p, q, 0x7632;
prmt.b32 $2, r, s, 0x5410;
prmt.b32 $3, r, s, 0x7632;
}""")


@triton.jit
def _block_scale(scales, values, n_blocks, block, inside, IS_NF4: tl.constexpr):
    """Return (the scale of each block; its zero point, for HQQ), fp32."""
    if IS_NF4:  # values: of the 8-bit codes of the blocks' scales; the layout is NF4's (nf4.py)
        n_groups = tl.cdiv(n_blocks, GROUP)
        group_scales = scales.to(tl.pointer_type(tl.float32))
        code = tl.load(scales + (n_groups + 1) * 4 + block, inside, 0).to(tl.int32)
        scale = tl.load(values + code) * tl.load(group_scales + block // GROUP, inside, 0.0)
        scale += tl.load(group_scales + n_groups)
        zero = scale
    else:
        halves = scales.to(tl.pointer_type(tl.float16))
        scale = tl.load(halves + block, inside, 0.0).to(tl.float32)
        zero = tl.load(halves + n_blocks + block, inside, 0.0).to(tl.float32)
    return scale, zero


@triton.jit
def _bound(scale, zero, inside, IS_NF4: tl.constexpr):
    """Return upper bounds of the absolute values of rows: [rows]. scale, zero, inside: [rows, blocks]."""
    bound = tl.abs(scale)
    if not IS_NF4:
        bound *= tl.maximum(tl.abs(zero), tl.abs(15 - zero))
    return tl.maximum(tl.max(tl.where(inside, bound, 0.0), 1), SMALLEST)


@triton.jit
def _store_scale(scale, row_scale, row, bound, largest, inside, HAS_ROW_SCALE: tl.constexpr):
    value = tl.div_rn(bound, largest + tl.zeros_like(bound))
    if HAS_ROW_SCALE:
        value *= tl.load(row_scale + row, inside, 0.0)
    tl.store(scale + row, value, inside)


# `out` is [2, O]: s_W, and what W's rows are multiplied by.
@triton.jit
def _find_scales(
    scales,
    scale_values,
    row_scale,
    out,
    n_rows,
    blocks_of_row,
    largest,
    IS_NF4: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row, i = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCKS)
    inside = (row < n_rows)[:, None] & (i < blocks_of_row)[None, :]
    block = row[:, None] * blocks_of_row + i[None, :]
    n_blocks = n_rows * blocks_of_row
    scale, zero = _block_scale(scales, scale_values, n_blocks, block, inside, IS_NF4)
    bound = _bound(scale, zero, inside, IS_NF4)
    _store_scale(out, row_scale, row, bound, largest, row < n_rows, HAS_ROW_SCALE)
    tl.store(out + n_rows + row, tl.div_rn(largest + tl.zeros_like(bound), bound), row < n_rows)


@triton.jit
def _entry(values, scale, zero, IS_NF4: tl.constexpr, i: tl.constexpr):
    """Return the byte of code i in e4m3, as int32."""
    weight = tl.load(values + i) * scale if IS_NF4 else (i - zero) * scale
    return weight.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _entries(values, scale, zero, IS_NF4: tl.constexpr, first: tl.constexpr):
    """Return the bytes of four codes, from `first` on, packed into int32."""
    a = _entry(values, scale, zero, IS_NF4, first)
    b = _entry(values, scale, zero, IS_NF4, first + 1)
    c = _entry(values, scale, zero, IS_NF4, first + 2)
    d = _entry(values, scale, zero, IS_NF4, first + 3)
    return a | (b << 8) | (c << 16) | (d << 24)


@triton.jit
def _lookup(codes, values, scale, zero, block, inside, IS_NF4: tl.constexpr):
    """Return the e4m3 bytes of blocks: int32 [blocks, WORDS], of a word's first and last four codes."""
    e0 = _entries(values, scale, zero, IS_NF4, 0)
    e1 = _entries(values, scale, zero, IS_NF4, 4)
    e2 = _entries(values, scale, zero, IS_NF4, 8)
    e3 = _entries(values, scale, zero, IS_NF4, 12)
    place = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    word = tl.load(codes.to(tl.pointer_type(tl.int32)) + place, inside[:, None], 0)
    if IS_NF4:  # the high half of a byte is the first code
        word = ((word & 0x0F0F0F0F) << 4) | ((word >> 4) & 0x0F0F0F0F)
    return tl.inline_asm_elementwise(
        LOOKUP,
        "=r,=r,r,r,r,r,r",
        [e0[:, None], e1[:, None], e2[:, None], e3[:, None], word],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


# A program has one row.
@triton.jit
def _expand(
    codes,
    scales,
    scale_values,
    values,
    row_scale,
    out,
    out_scale,
    n_blocks,
    blocks_of_row,
    largest,
    IS_NF4: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row, i = tl.program_id(0), tl.arange(0, BLOCKS)
    inside, block = i < blocks_of_row, row.to(tl.int64) * blocks_of_row + i
    scale, zero = _block_scale(scales, scale_values, n_blocks, block, inside, IS_NF4)
    bound = tl.sum(_bound(scale[None, :], zero[None, :], inside[None, :], IS_NF4), 0)
    _store_scale(out_scale, row_scale, row, bound, largest, True, HAS_ROW_SCALE)
    inverse = tl.div_rn(largest + tl.zeros_like(bound), bound)
    first, last = _lookup(codes, values, scale * inverse, zero, block, inside, IS_NF4)
    place = block[:, None] * (WORDS * 2) + tl.arange(0, WORDS * 2)[None, :]
    both = tl.join(first, last).reshape(BLOCKS, WORDS * 2)
    tl.store(out.to(tl.pointer_type(tl.int32)) + place, both, inside[:, None])


@triton.jit
def _lookup_of_row(
    codes, scales, scale_values, values, inverse, n_blocks, block, row, inside, IS_NF4: tl.constexpr
):
    """Return `_lookup` of one block of each row."""
    scale, zero = _block_scale(scales, scale_values, n_blocks, block, inside, IS_NF4)
    scale *= tl.load(inverse + row, inside, 0.0)
    return _lookup(codes, values, scale, zero, block, inside, IS_NF4)


@triton.jit
def _expand_transposed(
    codes,
    scales,
    scale_values,
    values,
    inverse,
    out,
    n_blocks,
    blocks_of_row,
    n_rows,
    IS_NF4: tl.constexpr,
    FOURS: tl.constexpr,
):
    # A program has one block of each of 4 FOURS rows.
    column, four = tl.program_id(0).to(tl.int64), tl.program_id(1) * FOURS + tl.arange(0, FOURS)
    inside = four * 4 < n_rows
    row = four.to(tl.int64) * 4
    block = row * blocks_of_row + column
    first0, last0 = _lookup_of_row(
        codes, scales, scale_values, values, inverse, n_blocks, block, row, inside, IS_NF4
    )
    block += blocks_of_row
    first1, last1 = _lookup_of_row(
        codes, scales, scale_values, values, inverse, n_blocks, block, row + 1, inside, IS_NF4
    )
    block += blocks_of_row
    first2, last2 = _lookup_of_row(
        codes, scales, scale_values, values, inverse, n_blocks, block, row + 2, inside, IS_NF4
    )
    block += blocks_of_row
    first3, last3 = _lookup_of_row(
        codes, scales, scale_values, values, inverse, n_blocks, block, row + 3, inside, IS_NF4
    )
    fours_of_column = n_rows // 4
    words = column * BLOCK + tl.arange(0, WORDS) * 8  # columns of W, so rows of the result
    out += (words * n_rows)[None, :] + (four * 4)[:, None]
    out = out.to(tl.pointer_type(tl.int32))
    t0, t1, t2, t3 = _transpose(first0, first1, first2, first3)
    mask = inside[:, None]
    tl.store(out, t0, mask)
    tl.store(out + fours_of_column, t1, mask)
    tl.store(out + 2 * fours_of_column, t2, mask)
    tl.store(out + 3 * fours_of_column, t3, mask)
    t0, t1, t2, t3 = _transpose(last0, last1, last2, last3)
    tl.store(out + 4 * fours_of_column, t0, mask)
    tl.store(out + 5 * fours_of_column, t1, mask)
    tl.store(out + 6 * fours_of_column, t2, mask)
    tl.store(out + 7 * fours_of_column, t3, mask)


@triton.jit
def _transpose(a, b, c, d):
    """Return four int32: byte i of each of a, b, c and d."""
    return tl.inline_asm_elementwise(
        TRANSPOSE,
        "=r,=r,=r,=r,r,r,r,r",
        [a, b, c, d],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _round_rows(
    x, column_scale, out, scale, n_columns, largest_number, HAS_SCALE: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    inside = column < n_columns
    value = tl.load(x + row * n_columns + column, inside, 0.0).to(tl.float32)
    if HAS_SCALE:
        value *= tl.load(column_scale + column, inside, 0.0)
    largest = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST)
    number = largest_number + tl.zeros_like(largest)
    rounded = (value * tl.div_rn(number, largest)).to(tl.float8e4nv)
    tl.store(out + row * n_columns + column, rounded, inside)
    tl.store(scale + row, tl.div_rn(largest, number))


def round_rows(x: Tensor, largest: float, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (x diag(column_scale) in e4m3: [T, K]; the scale of each row: [T] fp32).

    Args:
        x: [T, K], contiguous.
        largest: what a row's largest absolute value becomes.
        column_scale: [K] fp32, or None.
    """
    out, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), dtype=torch.float32)
    columns = triton.next_power_of_2(x.shape[1])
    if len(x):
        _round_rows[(len(x),)](
            x,
            x if column_scale is None else column_scale,
            out,
            scale,
            x.shape[1],
            largest,
            HAS_SCALE=column_scale is not None,
            COLUMNS=columns,
            num_warps=max(1, min(16, columns // 1024)),
        )
    return out, scale


def find_scales(
    scales: Tensor, table: Tensor | None, shape: tuple[int, int], row_scale: Tensor | None, largest: float
) -> tuple[Tensor, Tensor]:
    """Return (the scale of each row of W8, what the rows of W are multiplied by to become W8): [O] fp32.

    Args:
        scales: uint8, of NF4 with double quantization, or of HQQ with 4 bits.
        table: [256] fp32 with NF4, None with HQQ.
        shape: (O, I); I a multiple of 64.
        row_scale: [O] fp32, multiplied into the first result, or None.
        largest: what the upper bound of a row becomes.
    """
    blocks = triton.cdiv(shape[1], BLOCK.value)
    out = torch.empty(2, shape[0], dtype=torch.float32, device=scales.device)
    _find_scales[(triton.cdiv(shape[0], 8),)](
        scales,
        scales if table is None else table,
        scales if row_scale is None else row_scale,
        out,
        shape[0],
        blocks,
        largest,
        IS_NF4=table is not None,
        HAS_ROW_SCALE=row_scale is not None,
        ROWS=8,
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out[0], out[1]


def expand(
    codes: Tensor,
    scales: Tensor,
    table: Tensor | None,
    values: Tensor | None,
    shape: tuple[int, int],
    row_scale: Tensor | None,
    largest: float,
) -> tuple[Tensor, Tensor]:
    """Return (W8 in e4m3: [O, I]; the scale of each of its rows: [O] fp32).

    Args:
        codes: uint8, aligned to four bytes.
        values: [16] fp32 with NF4, what the codes stand for before scaling; None with HQQ.
        scales, table, shape, row_scale, largest: as for `find_scales`.
    """
    blocks = triton.cdiv(shape[1], BLOCK.value)
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=codes.device)
    scale = torch.empty(shape[0], dtype=torch.float32, device=codes.device)
    padded = triton.next_power_of_2(blocks)
    _expand[(shape[0],)](
        codes,
        scales,
        scales if table is None else table,
        scales if values is None else values,
        scales if row_scale is None else row_scale,
        out,
        scale,
        shape[0] * blocks,
        blocks,
        largest,
        IS_NF4=table is not None,
        HAS_ROW_SCALE=row_scale is not None,
        BLOCKS=padded,
        num_warps=max(1, min(8, padded // 32)),
        enable_fp_fusion=False,  # as in nf4_kernel.py
    )
    return out, scale


def expand_transposed(
    codes: Tensor,
    scales: Tensor,
    table: Tensor | None,
    values: Tensor | None,
    shape: tuple[int, int],
    inverse: Tensor,
) -> Tensor:
    """Return W8^T in e4m3, contiguous: [I, O].

    Args:
        codes, scales, table, values, shape: as for `expand`; O a multiple of 16.
        inverse: the second result of `find_scales`.
    """
    blocks = triton.cdiv(shape[1], BLOCK.value)
    out = torch.empty(shape[::-1], dtype=torch.float8_e4m3fn, device=codes.device)
    _expand_transposed[(blocks, triton.cdiv(shape[0], 4 * 32))](
        codes,
        scales,
        scales if table is None else table,
        scales if values is None else values,
        inverse,
        out,
        shape[0] * blocks,
        blocks,
        shape[0],
        IS_NF4=table is not None,
        FOURS=32,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return out
