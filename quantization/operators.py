"""The 4-bit matmul and its gradient, as operators that are opaque to torch.compile.

The large matmuls run in 16 bits, or in 8 (quantization/rounded.py); the low-rank branch always in 16.

They are opaque on purpose: the compiler would merge the backward's dequantization with the forward's, and
hold 16-bit weights in between. A checkpointing policy can name operators
(parallel/activation_checkpointing.py). Each operator either computes its low-rank branch in the large matmul,
or adds it to the result in place.

Shapes: O output features, I input features, R rank, T tokens (all leading dimensions of x).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.devices import triton_runs_on
from quantization.operator_registry import quantizer_of, register_operator
from quantization.rounded import ROUNDINGS, RoundedWeight, multiply
from quantization.rounded import round_rows as round_rows_of

ROUNDED_AT_ONCE = 2**26  # elements of a gradient


def dequantize(
    packed: tuple[Tensor, Tensor, Tensor | None],
    quantizer: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    row_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the weight of packed (codes, scales, table), whose codes and scales are in float storage.

    Args:
        packed: the codes, scales and table that `Quantizer.dequantize` takes; the first two viewed as floats.
        quantizer: its registered name, from `register_quantizer`.
        shape, dtype, row_scale, out: as for `Quantizer.dequantize`.
    """
    codes, scales, table = packed
    raw = codes.view(torch.uint8), scales.view(torch.uint8)
    return quantizer_of(quantizer).dequantize(*raw, table, tuple(shape), dtype, row_scale, out)


def _rounded_weight(
    packed: tuple[Tensor, Tensor, Tensor | None],
    quantizer: str,
    shape: Sequence[int],
    row_scale: Tensor | None,
    rounding: str,
) -> RoundedWeight:
    """Return a packed weight for a matmul in 8 bits.

    packed, quantizer, shape, row_scale: as for `dequantize`; rounding: name of one of ROUNDINGS.
    """
    codes, scales, table = packed
    raw = codes.view(torch.uint8), scales.view(torch.uint8), table, quantizer_of(quantizer)
    return RoundedWeight(*raw, (shape[0], shape[1]), row_scale, ROUNDINGS[rounding])


def _concatenates_branch(x: Tensor, quantizer: str, shape: Sequence[int], rank: int) -> bool:
    """Return whether the large matmul computes the low-rank branch too, as columns of the weight and of x.

    If the output is several times as wide as x, copying x costs less than writing the output a second time.
    """
    whole_blocks = shape[1] % quantizer_of(quantizer).block == 0
    aligned = (shape[1] + rank) % 8 == 0  # to 16 bytes, which fast matmuls need
    return x.is_cuda and shape[0] >= 2 * shape[1] and whole_blocks and aligned


_PACKED = "Tensor codes, Tensor scales, Tensor? table, str quantizer, int[] shape, Tensor? row_scale"


def _fake_round_rows(x, rounding):
    return x.new_empty(x.shape, dtype=ROUNDINGS[rounding].dtype), x.new_empty(
        x.shape[:-1], dtype=torch.float32
    )


@register_operator("(Tensor x, str rounding) -> (Tensor, Tensor)", _fake_round_rows)
def round_rows(x, rounding):
    """Return (x rounded: [T, I]; the scale of each token: [T] fp32). Without a gradient.

    It is an operator of its own, so that a compiler rounds an x once for all linears that read it.

    Args:
        x: [T, I].
        rounding: name of one of ROUNDINGS.
    """
    rounded, scale = round_rows_of(x.flatten(0, -2), ROUNDINGS[rounding])
    return rounded.view(x.shape), scale.view(x.shape[:-1])


_ROUNDED = "Tensor? rounded, Tensor? rounded_scale, str rounding"


def _fake_linear4bit(x, codes, scales, table, quantizer, shape, *_):
    return x.new_empty(*x.shape[:-1], shape[0])


@register_operator(
    f"(Tensor x, {_PACKED}, Tensor? bias, Tensor? h, Tensor? a, Tensor? b, bool save_output, {_ROUNDED})"
    " -> Tensor",
    _fake_linear4bit,
)
def linear4bit(
    x,
    codes,
    scales,
    table,
    quantizer,
    shape,
    row_scale,
    bias,
    h,
    a,
    b,
    save_output,
    rounded=None,
    rounded_scale=None,
    rounding="",
):
    """Return x (diag(g) W)^T + bias + h b^T: [T, O] in x's dtype, for a frozen packed W [O, I].

    Saves the packed weight for backward, not the dequantized one: FSDP frees the gathered storage after
    forward and fills it again before backward.

    Args:
        x: [T, I].
        codes, scales, table, quantizer: the packed W and its format, as for `dequantize`.
        shape: (O, I).
        row_scale: g [O] fp32, or None for ones.
        bias: [O], or None.
        h, b: the low-rank branch, [T, R] and [O, R] in x's dtype, or None.
        a: [R, I] if h is x a^T, made outside of autograd. Then backward forms the gradients of x and a that
            go through h, and adds them in place. Without a, h has a gradient of its own.
        save_output: asks a checkpointing policy to save the result instead of a recompute.
        rounded, rounded_scale: x and the scale of each token, of `round_rows`; None for a matmul in 16 bits.
        rounding: name of one of ROUNDINGS, for forward and backward; "" for matmuls in 16 bits.
    """
    if rounding:
        weight = _rounded_weight((codes, scales, table), quantizer, shape, row_scale, rounding)
        y = multiply(rounded.flatten(0, -2), rounded_scale.flatten(), *weight.expand(), x.dtype, bias)
        if h is not None:
            _add_low_rank(y, h.flatten(0, -2), b.t())
        return y.view(*x.shape[:-1], shape[0])
    packed = (codes, scales, table), quantizer, shape, x.dtype, row_scale
    if h is None:
        return F.linear(x, dequantize(*packed), bias)
    if _concatenates_branch(x, quantizer, shape, h.shape[-1]):
        weight_and_b = x.new_empty(shape[0], shape[1] + h.shape[-1])
        dequantize(*packed, out=weight_and_b[:, : shape[1]])
        weight_and_b[:, shape[1] :] = b
        # h may be a slice of several linears' h (parallel/inductor_passes.py). Unless both are contiguous,
        # torch's copy takes five times as long.
        return F.linear(torch.cat((x, h.contiguous()), -1), weight_and_b, bias)
    dense = dequantize(*packed)
    # The large matmul adds to the small one's result: it has time to read that, and the small one has not.
    y = F.linear(h, b, bias)
    y.view(-1, shape[0]).addmm_(x.flatten(0, -2), dense.t())
    return y


# The two operators of backward take any number of linears that have the same x. The compiler's graphs are
# rewritten to use this (parallel/inductor_passes.py): work on x and its gradient is done once for all.


def _fake_adapter_backward(grads, x, h, a, b):
    rank = sum(each.shape[1] for each in b)
    grad_a = x.new_empty(rank, x.shape[-1]) if a else h[0].new_empty(0)
    return [h[0].new_empty(*h[0].shape[:-1], rank), grad_a, *(torch.empty_like(each) for each in b)]


@register_operator(
    "(Tensor[] grads, Tensor? x, Tensor[] h, Tensor[] a, Tensor[] b) -> Tensor[]", _fake_adapter_backward
)
def adapter_backward(grads, x, h, a, b):
    """Return the gradients of the low-rank branches of linears with the same x: [grad_h, grad_a, *grad_b].

    grad_h [T, sum of R]: of all h, concatenated. grad_a [sum of R, I]: of all a, concatenated, or empty.
    grad_b: of each b, [O, R].

    It is an operator of its own, and runs before that of the large matmuls, which needs grad_h: x, maybe an
    activation of a quarter of a GiB, is freed before its gradient is made.

    Args:
        grads: gradients of the linears' results, [T, O] each.
        x: [T, I]; None without a.
        h, b: as for `linear4bit`, one of each linear.
        a: one of each linear, or an empty list.
    """
    ranks = [each.shape[1] for each in b]
    grad_h = h[0].new_empty(*h[0].shape[:-1], sum(ranks))
    for grad, each, out in zip(grads, b, grad_h.flatten(0, -2).split(ranks, 1), strict=True):
        torch.mm(grad.flatten(0, -2), each, out=out)
    grad_a = grad_h.flatten(0, -2).t() @ x.flatten(0, -2) if a else grad_h.new_empty(0)
    grad_b = (grad.flatten(0, -2).t() @ each.flatten(0, -2) for grad, each in zip(grads, h, strict=True))
    return [grad_h, grad_a, *grad_b]


def _fake_linear4bit_backward(
    grads, codes, scales, tables, quantizers, shapes, row_scales, grad_h, a, dependencies, roundings
):
    return grads[0].new_empty(*grads[0].shape[:-1], shapes[1])


@register_operator(
    "(Tensor[] grads, Tensor[] codes, Tensor[] scales, Tensor?[] tables, str[] quantizers, int[] shapes,"
    " Tensor?[] row_scales, Tensor? grad_h, Tensor[] a, Tensor[] dependencies, str[] roundings) -> Tensor",
    _fake_linear4bit_backward,
)
def linear4bit_backward(
    grads, codes, scales, tables, quantizers, shapes, row_scales, grad_h, a, dependencies, roundings
):
    """Return the gradient of x [T, I] through linears with the same x and, if there is an a, their branches.

    Args:
        grads: gradients of the linears' results, [T, O] each.
        codes, scales, tables, quantizers, row_scales: as for `linear4bit`, one of each linear.
        shapes: O, I, O, I, ...
        grad_h: [T, sum of R], of `adapter_backward`.
        a: [R, I], one of each linear, or an empty list.
        dependencies: not read. A compiler must compute them before this operator; later, their inputs could
            stay in memory through the backward of the layers below.
        roundings: as for `linear4bit`, one of each linear.
    """
    a_rows, grad_x = torch.cat(a) if len(a) > 1 else a[0] if a else None, None
    if a_rows is not None and not all(roundings):
        # The large matmul adds to the small one's result, as in `linear4bit`. One in 8 bits cannot add.
        grad_x, a_rows = grad_h.flatten(0, -2) @ a_rows, None
    each = zip(codes, scales, tables, strict=True), quantizers, zip(shapes[::2], shapes[1::2], strict=True)
    for grad, packed, quantizer, shape, row_scale, rounding in zip(
        grads, *each, row_scales, roundings, strict=True
    ):
        rows = grad.flatten(0, -2)
        if rounding:
            weight = _rounded_weight(packed, quantizer, shape, row_scale, rounding)
            grad_x = _add_rounded_product(grad_x, rows, weight)
            continue
        dense = dequantize(packed, quantizer, shape, grad.dtype, row_scale)
        grad_x = rows @ dense if grad_x is None else grad_x.addmm_(rows, dense)
        del dense  # before the next one is made
    assert grad_x is not None
    if a_rows is not None:
        _add_low_rank(grad_x, grad_h.flatten(0, -2), a_rows)
    return grad_x.view(*grads[0].shape[:-1], shapes[1])


def _add_low_rank(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a b to `total` in place and return it: [T, N], for a [T, R] and b [R, N] in total's dtype."""
    if triton_runs_on(total.device) and total.itemsize == 2:
        from quantization.low_rank_kernel import add_product  # Triton comes with torch's CUDA builds only

        return add_product(total, a, b)
    return total.addmm_(a, b)


def _add_rounded_product(total: Tensor | None, grad: Tensor, weight: RoundedWeight) -> Tensor:
    """Return total + grad diag(g) W, multiplied in 8 bits: [T, I] in grad's dtype; changes `total`, if any.

    grad: [T, O]. It is rounded in parts: its rounded form and the product may be as large as all else that is
    in memory at this point.
    """
    scale, inverse = weight.find_scales()
    operand = weight.expand_transposed(inverse)
    is_first = total is None
    total = grad.new_empty(len(grad), weight.shape[1]) if total is None else total
    step = max(1, ROUNDED_AT_ONCE // weight.shape[0])
    for rows, part in zip(grad.split(step), total.split(step), strict=True):
        rounded = round_rows_of(rows, weight.rounding, scale)
        if is_first:
            multiply(*rounded, operand, None, grad.dtype, out=part)
        else:
            part.add_(multiply(*rounded, operand, None, grad.dtype))
    return total


def _setup_context(ctx, inputs, output) -> None:
    """Save the inputs of `linear4bit` for backward; x only for the gradient of a, y only for that of g."""
    x, codes, scales, table, ctx.quantizer, ctx.shape, row_scale, _, h, a, b, *_, ctx.rounding = inputs
    y = None if row_scale is None else output
    ctx.save_for_backward(x if a is not None else None, codes, scales, table, row_scale, h, a, b, y)


def _backward(ctx, grad):
    """Return one gradient per input of `linear4bit`: x, row_scale, h or a, and b; else None. grad: [T, O]."""
    x, codes, scales, table, row_scale, h, a, b, y = ctx.saved_tensors
    packed = [codes], [scales], [table], [ctx.quantizer], ctx.shape, [row_scale]
    grad_h = grad_a = grad_b = grad_x = grad_scale = None
    a_list = [] if a is None else [a]
    if h is not None:
        grad_h, grad_a, grad_b = adapter_backward([grad], x, [h], a_list, [b])
    if row_scale is not None:  # the derivative by g is W x = (y - h b^T) / g
        rows = grad.flatten(0, -2)
        if grad.dtype == torch.float16:  # scaled gradients times outputs may exceed its largest number
            rows = rows.float()
        grad_scale = (rows * y.flatten(0, -2)).sum(0, dtype=torch.float32)
        if grad_b is not None:
            grad_scale = grad_scale - (grad_b.float() * b.float()).sum(1)
        grad_scale = grad_scale / row_scale
    if ctx.needs_input_grad[0]:  # last: x and y, maybe the widest activations, are freed before it
        dependencies = [] if grad_scale is None else [grad_scale]
        grad_x = linear4bit_backward([grad], *packed, grad_h, a_list, dependencies, [ctx.rounding])
    h_has_gradient = h is not None and a is None
    return (
        grad_x,
        *(None, None, None, None, None),
        grad_scale,
        None,
        grad_h if h_has_gradient else None,
        None if h_has_gradient else grad_a,
        grad_b,
        *(None, None, None, None),
    )


linear4bit.register_autograd(_backward, setup_context=_setup_context)
