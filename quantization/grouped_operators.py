"""Matmuls of rows with the weights of their experts, as operators that are opaque to torch.compile.

The rows are sorted by expert, and `offsets` holds the end of each expert's rows. In 16 bits on a GPU that
Triton supports, these numbers stay on the device: the host does not wait for them, and an operator is a few
kernels for any number of experts. Elsewhere the host reads them, and multiplies expert by expert.

An expert without rows gets the gradient 0.

Shapes: N rows, E experts, O output features, I input features. A packed stack has E P members, each a weight
[O / P, I] that was quantized alone: P is 2 where gate and up are one matmul, else 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from launch.devices import grouped_matmul_fills_all, grouped_matmul_runs_on, triton_runs_on
from quantization.operator_registry import quantizer_of, register_operator

ALIGNMENT = 8  # elements of 16 bits: the kernel loads 16 bytes at a time


def runs_grouped(x: Tensor, out_features: int, in_features: int) -> bool:
    """Return whether torch's grouped matmul takes rows like x and weights of these features."""
    is_aligned = out_features % ALIGNMENT == 0 and in_features % ALIGNMENT == 0
    return is_aligned and x.dtype == torch.bfloat16 and len(x) > 1 and grouped_matmul_runs_on(x.device)


def runs_in_triton(x: Tensor) -> bool:
    """Return whether our kernel (quantization/grouped_kernel.py) takes rows like x."""
    return x.dtype in (torch.bfloat16, torch.float16) and triton_runs_on(x.device)


def _row_slices(offsets: Tensor) -> list[slice]:
    """Return the rows of each expert. The host waits for the device."""
    return [slice(*ends) for ends in pairwise([0, *offsets.tolist()])]


def _begins(offsets: Tensor) -> Tensor:
    """Return the first row of each expert: [E]."""
    return torch.cat([offsets.new_zeros(1), offsets[:-1]])


def experts_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """Return the expert of each row: [N]."""
    row = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets, row, right=True)


def _multiply(
    x: Tensor, offsets: Tensor, shape: tuple[int, int], weights: Callable[[slice], Tensor], transposed: bool
) -> Tensor:
    """Return x W^T of each row's expert [N, O]; or, not `transposed`, x W [N, I].

    Args:
        x: [N, I] or, for x W, [N, O].
        offsets: [E] int32.
        shape: (O, I).
        weights: returns the weights of the experts of a slice, [experts, O, I] in x's dtype.
        transposed: whether W is transposed.
    """
    x = x.contiguous()
    if runs_grouped(x, *shape):
        all_weights = weights(slice(None))
        return torch._grouped_mm(x, all_weights.mT if transposed else all_weights, offs=offsets)
    if runs_in_triton(x):
        from quantization.grouped_kernel import multiply  # Triton comes with torch's CUDA builds only

        all_weights = weights(slice(None))
        return multiply(x, all_weights.mT if transposed else all_weights, offsets)
    y = x.new_empty(len(x), shape[0] if transposed else shape[1])
    for expert, rows in enumerate(_row_slices(offsets)):
        if rows.start < rows.stop:
            (weight,) = weights(slice(expert, expert + 1))
            torch.mm(x[rows], weight.t() if transposed else weight, out=y[rows])
    return y


def _add_bias(y: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Add each row's bias [E, O] to y [N, O], in place. The product is rounded before, as in transformers."""
    return y if bias is None else y.add_(bias[experts_of_rows(offsets, len(y))])


def _unpack_stack(
    codes: Tensor, scales: Tensor, table: Tensor | None, quantizer: str, shape: Sequence[int], x: Tensor
) -> Callable[[slice], Tensor]:
    """Return the function that dequantizes the weights of a slice of experts, for `_multiply`.

    Args: those of `grouped_linear4bit`; x: of the wanted dtype.
    """
    experts, parts, out_features, in_features = shape
    raw_codes, raw_scales = (t.view(torch.uint8).view(experts * parts, -1) for t in (codes, scales))
    dequantize_stack, member_shape = quantizer_of(quantizer).dequantize_stack, (out_features, in_features)

    def weights(chosen: slice) -> Tensor:
        first, end, _ = chosen.indices(experts)
        members = slice(first * parts, end * parts)
        stack = dequantize_stack(raw_codes[members], raw_scales[members], table, member_shape, x.dtype)
        return stack.view(end - first, parts * out_features, in_features)

    return weights


def _features(shape: Sequence[int]) -> tuple[int, int]:
    """Return (O, I) of a packed stack's shape (E, P, O / P, I)."""
    return shape[1] * shape[2], shape[3]


_PACKED = "Tensor codes, Tensor scales, Tensor? table, str quantizer, int[] shape"


def _fake_grouped_linear4bit(x, offsets, codes, scales, table, quantizer, shape, bias):
    return x.new_empty(x.shape[0], _features(shape)[0])


@register_operator(f"(Tensor x, Tensor offsets, {_PACKED}, Tensor? bias) -> Tensor", _fake_grouped_linear4bit)
def grouped_linear4bit(x, offsets, codes, scales, table, quantizer, shape, bias):
    """Return x W^T + bias of each row's expert: [N, O] in x's dtype, for a frozen packed stack.

    Saves the packed stack for backward, not the dequantized one, as `linear4bit` does.

    Args:
        x: [N, I].
        offsets: [E] int32, the end of each expert's rows.
        codes, scales: of all members, each padded to whole elements of the float storage.
        table, quantizer: as for `linear4bit`.
        shape: (E, P, O / P, I).
        bias: [E, O], frozen, or None.
    """
    weights = _unpack_stack(codes, scales, table, quantizer, shape, x)
    return _add_bias(_multiply(x, offsets, _features(shape), weights, True), offsets, bias)


def _fake_grouped_linear4bit_backward(grad, offsets, codes, scales, table, quantizer, shape):
    return grad.new_empty(grad.shape[0], shape[3])


@register_operator(f"(Tensor grad, Tensor offsets, {_PACKED}) -> Tensor", _fake_grouped_linear4bit_backward)
def grouped_linear4bit_backward(grad, offsets, codes, scales, table, quantizer, shape):
    """Return the gradient of x [N, I] through `grouped_linear4bit`; grad: that of its result, [N, O]."""
    weights = _unpack_stack(codes, scales, table, quantizer, shape, grad)
    return _multiply(grad, offsets, _features(shape), weights, False)


def _setup_context4bit(ctx, inputs, output) -> None:
    _, offsets, codes, scales, table, ctx.quantizer, ctx.shape, _ = inputs
    ctx.save_for_backward(offsets, codes, scales, table)


def _backward4bit(ctx, grad):
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = grouped_linear4bit_backward(grad, *ctx.saved_tensors, ctx.quantizer, ctx.shape)
    return grad_x, *([None] * 7)


grouped_linear4bit.register_autograd(_backward4bit, setup_context=_setup_context4bit)


def _fake_grouped_project4bit(codes, scales, table, quantizer, shape, a):
    return a.new_empty(shape[0], shape[1] * shape[2], a.shape[1])


@register_operator(f"({_PACKED}, Tensor a) -> Tensor", _fake_grouped_project4bit)
def grouped_project4bit(codes, scales, table, quantizer, shape, a):
    """Return W a^T of each expert of a packed stack: [E, O, R] in a's dtype. Without a gradient.

    Args:
        codes, scales, table, quantizer, shape: as for `grouped_linear4bit`.
        a: [E, R, I].
    """
    weights = _unpack_stack(codes, scales, table, quantizer, shape, a)
    if runs_in_triton(a):  # where a whole stack is expanded in forward, too
        return torch.bmm(weights(slice(None)), a.mT)
    return torch.cat([torch.bmm(weights(slice(e, e + 1)), a[e : e + 1].mT) for e in range(shape[0])])


def _fake_grouped_linear(x, offsets, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[1])


@register_operator("(Tensor x, Tensor offsets, Tensor weight, Tensor? bias) -> Tensor", _fake_grouped_linear)
def grouped_linear(x, offsets, weight, bias):
    """Return x W^T + bias of each row's expert: [N, O].

    Args:
        x: [N, I].
        offsets: [E] int32, the end of each expert's rows.
        weight: [E, O, I] in x's dtype.
        bias: [E, O] in x's dtype, or None.
    """
    y = _multiply(x, offsets, (weight.shape[1], weight.shape[2]), weight.__getitem__, True)
    return _add_bias(y, offsets, bias)


def _fake_grouped_linear_backward(grad, offsets, weight):
    return grad.new_empty(grad.shape[0], weight.shape[2])


@register_operator("(Tensor grad, Tensor offsets, Tensor weight) -> Tensor", _fake_grouped_linear_backward)
def grouped_linear_backward(grad, offsets, weight):
    """Return the gradient of x [N, I] through `grouped_linear`; grad: that of its result, [N, O]."""
    return _multiply(grad, offsets, (weight.shape[1], weight.shape[2]), weight.__getitem__, False)


def _fake_grouped_weight_backward(grad, offsets, x):
    return x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])


@register_operator("(Tensor grad, Tensor offsets, Tensor x) -> Tensor", _fake_grouped_weight_backward)
def grouped_weight_backward(grad, offsets, x):
    """Return the gradient of the weights: [E, O, I].

    Args:
        grad: gradient of the result, [N, O].
        offsets: [E] int32.
        x: [N, I].
    """
    grad, x = grad.contiguous(), x.contiguous()
    if runs_grouped(x, grad.shape[1], x.shape[1]):
        weight_grad = torch._grouped_mm(grad.t(), x, offs=offsets)
        if grouped_matmul_fills_all(x.device):
            return weight_grad
        is_idle = offsets == _begins(offsets)
        return weight_grad.masked_fill_(is_idle[:, None, None], 0)  # what it replaces may be NaN
    if runs_in_triton(x):
        from quantization.grouped_kernel import multiply_transposed

        return multiply_transposed(grad, x, offsets)
    weight_grad = x.new_zeros(len(offsets), grad.shape[1], x.shape[1])
    for expert, rows in enumerate(_row_slices(offsets)):
        if rows.start < rows.stop:
            torch.mm(grad[rows].t(), x[rows], out=weight_grad[expert])
    return weight_grad


def sum_rows(x: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum of each expert's rows of x [N, O]: [E, O]. A matmul: its order of additions is fixed."""
    rows = torch.arange(x.shape[0], device=x.device)
    is_own = (_begins(offsets)[:, None] <= rows) & (rows < offsets[:, None])  # [E, N]
    return is_own.to(x.dtype) @ x


def _setup_context(ctx, inputs, output) -> None:
    """Save the inputs of `grouped_linear` for backward; x only for the gradient of the weights."""
    x, offsets, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, offsets, weight)


def _backward(ctx, grad):
    """Return one gradient per input of `grouped_linear`: x, weight and bias."""
    x, offsets, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[2]:
        grad_weight = grouped_weight_backward(grad, offsets, x)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = sum_rows(grad, offsets)
    if ctx.needs_input_grad[0]:
        grad_x = grouped_linear_backward(grad, offsets, weight)
    return grad_x, None, grad_weight, grad_bias


grouped_linear.register_autograd(_backward, setup_context=_setup_context)


def _fake_gather_rows(x, order, inverse, k):
    return x.new_empty(order.shape[0], x.shape[1])


@register_operator("(Tensor x, Tensor order, Tensor inverse, int k) -> Tensor", _fake_gather_rows)
def gather_rows(x, order, inverse, k):
    """Return x[order // k]: each row of x k times, permuted.

    Its gradient sums the k copies of a row in the order of the copies. That of torch's indexing adds them in
    any order on a GPU.

    Args:
        x: [N / k, H].
        order: [N], a permutation.
        inverse: [N], the inverse permutation.
        k: copies of each row.
    """
    return x.index_select(0, order // k if k > 1 else order)


def _setup_gather_context(ctx, inputs, output) -> None:
    _, _, inverse, ctx.k = inputs
    ctx.save_for_backward(inverse)


def _gather_backward(ctx, grad):
    (inverse,) = ctx.saved_tensors
    rows = grad.index_select(0, inverse)
    return (rows if ctx.k == 1 else rows.unflatten(0, (-1, ctx.k)).sum(1)), None, None, None


gather_rows.register_autograd(_gather_backward, setup_context=_setup_gather_context)


def sort_by_expert(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (order, inverse, offsets) of the rows of a token's experts. The host does not wait.

    Row i of the T K rows is that of expert index.flatten()[i] for token i // K. order [T K]: the first
    expert's rows, the second's, and so on. inverse [T K]: where each row went. offsets [E] int32: the end of
    each expert's rows.

    Args:
        index: [T, K], each token's experts.
        experts: E.
    """
    flat = index.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    # torch.bincount would wait for the device, and so read the numbers.
    below = flat[:, None] <= torch.arange(experts, device=flat.device)
    return order, inverse, below.sum(0, dtype=torch.int32)
