"""Multiply rows with the weights of their experts in one Triton kernel, where torch has no kernel for it.

That is on GPUs of compute capability 8 and 12 (Ampere, Ada, consumers' Blackwell), and in fp16. The numbers
of rows per expert stay on the GPU: a program finds its expert by the ends of the experts' rows. Sums are in
fp32, in a fixed order. Imported only where there is a GPU that Triton supports.

Shapes: N rows, sorted by expert; E experts; W [E, A, B], the weights, of any strides; O and I features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER = 64, 128, 32


# As `multiply`. E_POWER: a power of two that is at least E. A program computes BLOCK_ROWS rows of one expert.
# There are more programs than such blocks, because only the GPU knows the number; those left over return.
@triton.jit
def _multiply(
    x,
    weights,
    offsets,
    y,
    n_experts,
    inner,
    columns,
    x_stride,
    expert_stride,
    inner_stride,
    column_stride,
    y_stride,
    E_POWER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    experts = tl.arange(0, E_POWER)
    ends = tl.load(offsets + experts, experts < n_experts, 0)
    begins = tl.load(offsets + experts - 1, (experts > 0) & (experts < n_experts), 0)
    blocks = (ends - begins + BLOCK_ROWS - 1) // BLOCK_ROWS  # of each expert; 0 beyond the last
    block_ends = tl.cumsum(blocks, 0)
    block = tl.program_id(0)
    if block < tl.sum(blocks):
        expert = tl.sum((block_ends <= block).to(tl.int32))
        is_own = experts == expert
        end = tl.sum(tl.where(is_own, ends, 0))
        first = tl.sum(tl.where(is_own, begins + (block - (block_ends - blocks)) * BLOCK_ROWS, 0))
        row = first + tl.arange(0, BLOCK_ROWS)
        column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        k = tl.arange(0, BLOCK_INNER)
        row_inside, column_inside = row[:, None] < end, column[None, :] < columns
        x_at = x + row.to(tl.int64)[:, None] * x_stride + k[None, :]
        w_at = weights + expert.to(tl.int64) * expert_stride
        w_at = w_at + k[:, None] * inner_stride + column[None, :] * column_stride
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(0, inner, BLOCK_INNER):
            k_inside = k < inner - start
            a = tl.load(x_at, row_inside & k_inside[None, :], 0.0)
            b = tl.load(w_at, k_inside[:, None] & column_inside, 0.0)
            total = tl.dot(a, b, total)
            x_at += BLOCK_INNER
            w_at += BLOCK_INNER * inner_stride
        y_at = y + row.to(tl.int64)[:, None] * y_stride + column[None, :]
        tl.store(y_at, total.to(y.dtype.element_ty), row_inside & column_inside)


def multiply(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return x W of each row's expert: [N, B] in x's dtype.

    Args:
        x: [N, A] in 16 bits, contiguous.
        weights: [E, A, B] in x's dtype, of any strides.
        offsets: [E] int32, the end of each expert's rows.
    """
    (experts, inner, columns), rows = weights.shape, len(x)
    y = x.new_empty(rows, columns)
    # Each expert may have one block that is not full.
    grid = triton.cdiv(rows, BLOCK_ROWS) + experts, triton.cdiv(columns, BLOCK_COLUMNS)
    _multiply[grid](
        x,
        weights,
        offsets,
        y,
        experts,
        inner,
        columns,
        x.stride(0),
        *weights.stride(),
        y.stride(0),
        E_POWER=triton.next_power_of_2(experts),
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        BLOCK_INNER=BLOCK_INNER,
        num_warps=4,
        num_stages=3,
    )
    return y


# As `multiply_transposed`. A program computes a block of one expert's gradient.
@triton.jit
def _multiply_transposed(
    grad,
    x,
    offsets,
    out,
    outputs,
    inputs,
    grad_stride,
    x_stride,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    expert = tl.program_id(2)
    end = tl.load(offsets + expert)
    begin = tl.load(offsets + expert - 1, expert > 0, 0)
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    column = tl.program_id(1) * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
    output_inside, column_inside = output[:, None] < outputs, column[None, :] < inputs
    k = tl.arange(0, BLOCK_INNER)
    total = tl.zeros((BLOCK_OUTPUTS, BLOCK_INPUTS), tl.float32)
    for start in range(begin, end, BLOCK_INNER):
        row = (start + k).to(tl.int64)
        inside = row < end
        a = tl.load(grad + row[None, :] * grad_stride + output[:, None], inside[None, :] & output_inside, 0.0)
        b = tl.load(x + row[:, None] * x_stride + column[None, :], inside[:, None] & column_inside, 0.0)
        total = tl.dot(a, b, total)
    out_at = out + expert.to(tl.int64) * outputs * inputs + output.to(tl.int64)[:, None] * inputs
    tl.store(out_at + column[None, :], total.to(out.dtype.element_ty), output_inside & column_inside)


def multiply_transposed(grad: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return grad^T x over each expert's rows: [E, O, I] in x's dtype; zeros without rows.

    Args:
        grad: [N, O] in 16 bits, contiguous.
        x: [N, I] in grad's dtype, contiguous.
        offsets: [E] int32, the end of each expert's rows.
    """
    outputs, inputs, experts = grad.shape[1], x.shape[1], len(offsets)
    out = x.new_empty(experts, outputs, inputs)
    grid = triton.cdiv(outputs, BLOCK_ROWS), triton.cdiv(inputs, BLOCK_COLUMNS), experts
    _multiply_transposed[grid](
        grad,
        x,
        offsets,
        out,
        outputs,
        inputs,
        grad.stride(0),
        x.stride(0),
        BLOCK_OUTPUTS=BLOCK_ROWS,
        BLOCK_INPUTS=BLOCK_COLUMNS,
        BLOCK_INNER=BLOCK_INNER,
        num_warps=4,
        num_stages=3,
    )
    return out
