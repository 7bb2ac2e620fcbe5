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
from functools import cache

import torch
from torch import Tensor

from launch.devices import triton_runs_on
from quantization.quantizers import Quantizer

AT_ONCE = 2**25  # elements that plain operations round or multiply at a time, with 8 to 13 bytes for each
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
    x = x.contiguous()  # so that the results are, as compiled code expects
    if triton_runs_on(x.device) and rounding.dtype.is_floating_point:
        from quantization.rounded_kernel import round_rows  # Triton comes with torch's CUDA builds only

        return round_rows(x, rounding.largest, column_scale)
    out, scale = torch.empty_like(x, dtype=rounding.dtype), x.new_empty(len(x), dtype=torch.float32)
    parts = (tensor.split(max(1, AT_ONCE // x.shape[1])) for tensor in (x, out, scale))
    for rows, rounded, row_scale in zip(*parts, strict=True):
        _round_rows_into(rounded, row_scale, rows, rounding, column_scale)
    return out, scale


def _round_rows_into(
    out: Tensor, scale: Tensor, x: Tensor, rounding: Rounding, column_scale: Tensor | None
) -> None:
    """Fill the two results of `round_rows`, which are the first two arguments, with plain operations."""
    wide = x.float() if column_scale is None else x.float() * column_scale
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    rounded = wide * (torch.full_like(largest, rounding.largest) / largest)
    if not rounding.dtype.is_floating_point:  # integers have neither NaN nor infinity: the scale has it
        largest = torch.where(largest.isfinite(), largest, torch.nan)
        rounded = rounded.nan_to_num(0)
    out.copy_(rounding.round(rounded))
    scale.copy_((largest / rounding.largest).squeeze(-1))


@dataclass(frozen=True)
class RoundedWeight:
    """A packed weight, to be expanded to 8 bits.

    Attributes:
        codes, scales, table, quantizer: as `Quantizer.dequantize` takes them; the first two uint8.
        shape: (O, I).
        row_scale: DoRA's g [O] fp32, or None for ones.
        rounding: the format to expand it to.
    """

    codes: Tensor
    scales: Tensor
    table: Tensor | None
    quantizer: Quantizer
    shape: tuple[int, int]
    row_scale: Tensor | None
    rounding: Rounding

    def expand(self) -> tuple[Tensor, Tensor]:
        """Return (W8: [O, I], s_W: [O] fp32)."""
        if self._has_kernel:
            from quantization.rounded_kernel import expand

            packed = self.codes, self.scales, self.table, self.quantizer.code_values(self.codes.device)
            return expand(*packed, self.shape, self.row_scale, self.rounding.largest)
        scale, inverse = self.find_scales()
        return self._round_by(inverse), scale

    def find_scales(self) -> tuple[Tensor, Tensor]:
        """Return (s_W, what W's rows are multiplied by to become W8), [O] fp32 each."""
        if self._has_kernel:
            from quantization.rounded_kernel import find_scales

            return find_scales(self.scales, self.table, self.shape, self.row_scale, self.rounding.largest)
        blocks = self.quantizer.block_bounds(self.scales, self.table, self.shape)
        bounds = blocks.view(self.shape[0], -1).amax(1).clamp_min(SMALLEST)
        scale = bounds / self.rounding.largest
        scale = scale if self.row_scale is None else scale * self.row_scale
        # A number divided by a tensor would be rounded twice.
        return scale, torch.full_like(bounds, self.rounding.largest) / bounds

    def expand_transposed(self, inverse: Tensor) -> Tensor:
        """Return W8^T, contiguous: [I, O]. inverse: the second of `find_scales`."""
        if self._has_kernel:
            from quantization.rounded_kernel import expand_transposed

            packed = self.codes, self.scales, self.table, self.quantizer.code_values(self.codes.device)
            return expand_transposed(*packed, self.shape, inverse)
        return self._round_by(inverse).t().contiguous()

    def _round_by(self, inverse: Tensor) -> Tensor:
        packed = self.codes, self.scales, self.table, self.shape
        return self.rounding.round(self.quantizer.dequantize(*packed, torch.float32, inverse))

    @property
    def _has_kernel(self) -> bool:
        is_float = self.rounding.dtype.is_floating_point
        return is_float and self.quantizer.has_4bit_blocks_of_64 and triton_runs_on(self.codes.device)


@cache
def _ones(n: int, device: torch.device) -> Tensor:
    """Return n ones: fp32, on the device (cached). They are never freed: CUDA graphs hold their address."""
    return torch.ones(n, device=device)


def multiply(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return diag(a_scale) a b^T diag(b_scale) + bias: [T, N] in `dtype`.

    fp8 products are summed by a GPU's tensor cores in less than fp32 ("fast accumulation"; docs/fp8.md has
    the error). int8 products are summed exactly.

    Args:
        a: [T, K], rounded.
        a_scale: [T] fp32.
        b: [N, K], rounded.
        b_scale: [N] fp32, or None for ones.
        dtype: of the result; bf16 for fp8 on a GPU.
        bias: [N], or None.
        out: [T, N], filled and returned.
    """
    out = torch.empty(len(a), len(b), dtype=dtype, device=a.device) if out is None else out
    if a.dtype.is_floating_point and a.is_cuda:
        columns = _ones(len(b), b.device) if b_scale is None else b_scale
        operands = a, b.t(), a_scale[:, None], columns[None, :]
        if len(a):
            torch._scaled_mm(*operands, bias=bias, out_dtype=out.dtype, use_fast_accum=True, out=out)
        return out
    step = max(1, AT_ONCE // len(b))
    for rows, scale, result in zip(a.split(step), a_scale.split(step), out.split(step), strict=True):
        y = _multiply_exactly(rows, b).mul_(scale[:, None])
        if b_scale is not None:
            y *= b_scale
        result.copy_(y if bias is None else y + bias)
    return out


def _multiply_exactly(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T without the scales: [T, N] fp32. a, b: as for `multiply`."""
    if a.dtype.is_floating_point:
        return a.float() @ b.float().t()
    # On GPUs torch._int_mm needs more than 16 rows.
    rows = torch.nn.functional.pad(a, (0, 0, 0, max(0, 17 - len(a))))
    return torch._int_mm(rows, b.t())[: len(a)].float()
