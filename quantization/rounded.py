"""Matmuls in 8 bits (--base_matmul): x and the frozen weight are rounded to 8 bits, each row with a scale.

    y = x W^T    ~    diag(s_x) (x8 W8^T) diag(s_W),    x8 = round(x / s_x), W8 = round(W / s_W)

The scale of a token is its largest absolute value divided by the largest 8-bit number. That of a weight's
row comes from an upper bound of its absolute values, which the packed weight's block scales give without a
pass over the weight. DoRA's row scale g is part of s_W, and does not change W8. In backward, the scales of
W's rows are along the dimension that is summed over. So the gradient is multiplied by them before it is
rounded:

    grad_x = grad W    ~    diag(s_grad) (grad8 W8),    grad8 = round(grad diag(s_W) / s_grad)

What is rounded depends on nothing but a token or a row, so packing, sharding and accumulation change nothing.
Infinities and NaN are not hidden: they make their token's results NaN or infinite. A token or a row of zeros
stays zero.

Two formats: `fp8` is e4m3 (FP8 Formats for Deep Learning, arXiv 2209.05433), of GPUs of compute capability
8.9 and 9.0 on. `int8` has integers, which older GPUs multiply faster than 16-bit numbers.

Shapes: O output features, I input features, T tokens, K the dimension that a matmul sums over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.devices import triton_runs_on
from quantization.quantizers import Quantizer

SMALLEST = 2.0**-100  # the least that a row's largest value counts as: a row of zeros has no scale


@dataclass(frozen=True)
class Rounding:
    """A format that both operands of a matmul are rounded to.

    Attributes:
        dtype: of the rounded numbers.
        largest: the largest one.
        capability: the lowest CUDA compute capability of GPUs that multiply them.
    """

    dtype: torch.dtype
    largest: float
    capability: tuple[int, int]

    def round(self, x: Tensor) -> Tensor:
        """Return x, fp32 and within the range, rounded to the nearest number of the format."""
        return (x if self.dtype.is_floating_point else x.round()).to(self.dtype)


# By name, as --base_matmul has it. "16bit" is none of them.
ROUNDINGS = {
    "fp8": Rounding(torch.float8_e4m3fn, 448.0, (8, 9)),
    "int8": Rounding(torch.int8, 127.0, (7, 5)),
}


def fits(shape: Sequence[int], block: int) -> bool:
    """Return whether a weight of this shape can be rounded: whole blocks in a row, multiples of 16."""
    return shape[1] % block == 0 and all(n % 16 == 0 for n in shape)


def round_rows(x: Tensor, rounding: Rounding, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (x diag(column_scale), rounded: [T, K]; the scale of each row: [T] fp32).

    Args:
        x: [T, K].
        rounding: the format.
        column_scale: [K] fp32, or None for ones.
    """
    if triton_runs_on(x.device) and rounding.dtype.is_floating_point:
        from quantization.rounded_kernel import round_rows  # Triton comes with torch's CUDA builds only

        return round_rows(x.contiguous(), rounding.largest, column_scale)
    exact = x.float() if column_scale is None else x.float() * column_scale
    largest = exact.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    rounded = exact * (rounding.largest / largest)
    if not rounding.dtype.is_floating_point:  # integers have neither NaN nor infinity: the scale has it
        largest = torch.where(largest.isfinite(), largest, torch.nan)
        rounded = rounded.nan_to_num(0)
    return rounding.round(rounded), (largest / rounding.largest).squeeze(-1)


@dataclass(frozen=True)
class PackedRows:
    """A packed weight, and how its rows are scaled.

    Attributes:
        codes, scales, table, quantizer: as `Quantizer.dequantize` takes them; the first two uint8.
        shape: (O, I).
        rounding: the format to expand it to.
        bounds: upper bounds of each row's absolute values, at least SMALLEST: [O] fp32.
    """

    codes: Tensor
    scales: Tensor
    table: Tensor | None
    quantizer: Quantizer
    shape: tuple[int, int]
    rounding: Rounding
    bounds: Tensor

    def row_scale(self, own: Tensor | None) -> Tensor:
        """Return s_W: [O] fp32. own: DoRA's scale of each row, [O] fp32, or None for ones."""
        scale = self.bounds / self.rounding.largest
        return scale if own is None else scale * own

    def expand(self) -> Tensor:
        """Return W8: [O, I]."""
        inverse = self.rounding.largest / self.bounds
        if self._has_kernel:
            from quantization.rounded_kernel import expand

            return expand(self.codes, self.scales, self.table, inverse, self.shape, transposed=False)
        packed = self.codes, self.scales, self.table, self.shape
        return self.rounding.round(self.quantizer.dequantize(*packed, torch.float32, inverse))

    def expand_transposed(self) -> Tensor:
        """Return W8^T, contiguous: [I, O]."""
        if self._has_kernel:
            from quantization.rounded_kernel import expand

            inverse = self.rounding.largest / self.bounds
            return expand(self.codes, self.scales, self.table, inverse, self.shape, transposed=True)
        return self.expand().t().contiguous()

    @property
    def _has_kernel(self) -> bool:
        is_float = self.rounding.dtype.is_floating_point
        return is_float and self.quantizer.has_4bit_blocks_of_64 and triton_runs_on(self.codes.device)


def packed_rows(
    packed: tuple[Tensor, Tensor, Tensor | None],
    quantizer: Quantizer,
    shape: Sequence[int],
    rounding: Rounding,
) -> PackedRows:
    """Return a packed weight with the bounds of its rows.

    packed: (codes, scales, table), the first two uint8.
    """
    codes, scales, table = packed
    features = shape[0], shape[1]
    if quantizer.has_4bit_blocks_of_64 and triton_runs_on(codes.device):
        from quantization.rounded_kernel import row_bounds

        bounds = row_bounds(scales, table, features)
    else:
        blocks = quantizer.block_bounds(scales, table, features)
        bounds = blocks.view(shape[0], -1).amax(1).clamp_min(SMALLEST)
    return PackedRows(codes, scales, table, quantizer, features, rounding, bounds)


def multiply(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """Return diag(a_scale) a b^T diag(b_scale) + bias: [T, N] in `dtype`.

    On a GPU, fp8 products are summed by the tensor cores with 14 bits at least, and in part in fp32 ("fast
    accumulation"; docs/fp8.md says what it costs). int8 products are summed exactly.

    Args:
        a: [T, K], rounded.
        a_scale: [T] fp32.
        b: [N, K], rounded.
        b_scale: [N] fp32, or None for ones.
        dtype: of the result.
        bias: [N], or None.
    """
    if a.dtype.is_floating_point and a.is_cuda:
        if not len(a):
            return a.new_zeros(0, len(b), dtype=dtype)
        columns = a_scale.new_ones(len(b)) if b_scale is None else b_scale
        # With scales of rows and columns the result can only be bf16.
        return torch._scaled_mm(
            *(a, b.t(), a_scale[:, None], columns[None, :]),
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ).to(dtype)
    if a.dtype.is_floating_point:
        y = a.float() @ b.float().t()
    else:
        # On GPUs torch._int_mm needs more than 16 rows.
        rows = torch.nn.functional.pad(a, (0, 0, 0, max(0, 17 - len(a))))
        y = torch._int_mm(rows, b.t())[: len(a)].float()
    y *= a_scale[:, None]
    if b_scale is not None:
        y *= b_scale
    return (y if bias is None else y + bias).to(dtype)
