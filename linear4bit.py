"""The 4-bit matmul and its gradient as operators that torch.compile takes whole.

Opaque to the compiler on purpose: it would merge the backward's dequantization with the forward's, and keep
16-bit weights in between. As operators they can be named by a checkpointing policy (recompute.py), and each adds
its low-rank branch into the result of the big matmul in place.

Shapes: O output features, I input features, R rank, T tokens (all leading dimensions of x).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from quantizers import Quantizer

TINY = torch.finfo(torch.float32).tiny

# Operators take numbers, strings and tensors; a quantizer goes by its name.
_QUANTIZERS: dict[str, Quantizer] = {}


def name_of(quantizer: Quantizer) -> str:
    """What the operators below call it. Equal quantizers have one name."""
    _QUANTIZERS[str(quantizer)] = quantizer
    return str(quantizer)


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which a linear computes: autocast's, within it, else x's own. For what autocast does not look into."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def dequantize(packed: tuple, quantizer: str, shape: list[int], dtype, row_scale=None) -> Tensor:
    """`Quantizer.dequantize` of (codes, scales, table) with codes and scales in float storage."""
    codes, scales, table = packed
    raw = codes.view(torch.uint8), scales.view(torch.uint8)
    return _QUANTIZERS[quantizer].dequantize(*raw, table, tuple(shape), dtype, row_scale)


_PACKED = "Tensor codes, Tensor scales, Tensor? table, str quantizer, int[] shape, Tensor? row_scale"


@torch.library.custom_op(
    "fsdp_finetune::linear4bit",
    mutates_args=(),
    schema=f"(Tensor x, {_PACKED}, Tensor? bias, Tensor? h, Tensor? a, Tensor? b, bool keep) -> Tensor",
)
def linear4bit(x, codes, scales, table, quantizer, shape, row_scale, bias, h, a, b, keep):
    """x (diag(g) W)^T + bias + h b^T: [T, O] in x's dtype, for a frozen packed W [O, I].

    row_scale: g [O] fp32, or None for ones. h [T, R] and b [O, R], both in x's dtype: the low-rank branch, or None.
    a [R, I]: says that h is x a^T, made outside of autograd; the gradients of x and a by way of h are then formed
    here, where they can be added in place. Without a, h gets a gradient of its own. keep: says to a checkpointing
    policy that the result is not to be computed again.

    Saves the packed weight, not the dequantized one: FSDP frees the gathered storage after forward and fills it
    again before backward.
    """
    weight = dequantize((codes, scales, table), quantizer, shape, x.dtype, row_scale)
    if h is None:
        return F.linear(x, weight, bias)
    # The large matmul adds into the small one's result: it has time to read it, which a small one has not.
    y = F.linear(h, b, bias)
    y.view(-1, shape[0]).addmm_(x.flatten(0, -2), weight.t())
    return y


@linear4bit.register_fake
def _(x, codes, scales, table, quantizer, shape, row_scale, bias, h, a, b, keep):
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op(
    "fsdp_finetune::linear4bit_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_PACKED}, Tensor? x, Tensor? h, Tensor? a, Tensor? b, bool of_x)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def linear4bit_backward(grad, codes, scales, table, quantizer, shape, row_scale, x, h, a, b, of_x):
    """The gradients of x [T, I], if wanted, of h [T, R] (or, with a, of a [R, I] instead), and of b [O, R]; empty
    tensors for those that are not there. grad: [T, O].

    All in one operator, so that x, which may be an activation of a quarter of a GiB, is not needed beyond it.
    """
    rows = grad.flatten(0, -2)
    none = partial(grad.new_empty, 0)  # an operator's results must not be the same tensor
    of_h = none() if h is None else grad @ b
    of_b = none() if h is None else rows.t() @ h.flatten(0, -2)
    of_a = none() if a is None else of_h.flatten(0, -2).t() @ x.flatten(0, -2)
    if not of_x:
        of_input = none()
    else:
        weight = dequantize((codes, scales, table), quantizer, shape, grad.dtype, row_scale)
        if a is None:
            of_input = grad @ weight
        else:
            of_input = of_h @ a
            of_input.view(-1, shape[1]).addmm_(rows, weight)
    return of_input, of_h if a is None else none(), of_a, of_b


@linear4bit_backward.register_fake
def _(grad, codes, scales, table, quantizer, shape, row_scale, x, h, a, b, of_x):
    def like(wanted, *size):
        return grad.new_empty(*size) if wanted else grad.new_empty(0)

    tokens = grad.shape[:-1]
    return (
        like(of_x, *tokens, shape[1]),
        like(h is not None and a is None, *tokens, b.shape[1] if b is not None else 0),
        like(a is not None, *(a.shape if a is not None else ())),
        like(h is not None, *(b.shape if b is not None else ())),
    )


def _setup(ctx, inputs, output) -> None:
    x, codes, scales, table, ctx.quantizer, ctx.shape, row_scale, _, h, a, b, _ = inputs
    y = None if row_scale is None else output
    ctx.save_for_backward(x if a is not None else None, codes, scales, table, row_scale, h, a, b, y)


def _backward(ctx, grad):
    x, codes, scales, table, row_scale, h, a, b, y = ctx.saved_tensors
    packed = codes, scales, table, ctx.quantizer, ctx.shape, row_scale
    of_x, of_h, of_a, of_b = linear4bit_backward(grad, *packed, x, h, a, b, ctx.needs_input_grad[0])
    of_scale = None
    if row_scale is not None:  # the derivative by g is W x = (y - h b^T) / g
        rows = grad.flatten(0, -2)
        if grad.dtype == torch.float16:  # scaled gradients times outputs may pass its largest number
            rows = rows.float()
        of_scale = (rows * y.flatten(0, -2)).sum(0, dtype=torch.float32)
        if h is not None:
            of_scale = of_scale - (of_b.float() * b.float()).sum(1)
        of_scale = of_scale / row_scale
    return (
        of_x if ctx.needs_input_grad[0] else None,
        *(None, None, None, None, None),
        of_scale,
        None,
        of_h if h is not None and a is None else None,
        of_a if a is not None else None,
        of_b if h is not None else None,
        None,
    )


linear4bit.register_autograd(_backward, setup_context=_setup)


def factored_norm(projected: Tensor, a: Tensor, b: Tensor, scaling: float, squared_norm: Tensor) -> Tensor:
    """||W + s B A|| of each row: [O], fp32, without a gradient; never of a materialised W + s B A, which would
    round it to W's dtype:

        ||W + s B A||^2 = ||W||^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B)

    projected: W A^T [O, R]; a [R, I] and b [O, R] as they are trained; squared_norm: ||W||^2, [O] fp32.
    """
    exact_a, b = a.float(), b.float()
    # W A^T + s/2 B A A^T: [O, R]. The sum is fp32: where the dtypes differ, torch promotes.
    half = torch.add(projected, b @ (exact_a @ exact_a.t()), alpha=scaling / 2)
    norm = torch.add(squared_norm, (half * b).sum(1), alpha=2 * scaling)
    return norm.clamp_min(TINY).sqrt()  # rounding may leave less than 0 where W = -s B A


@torch.library.custom_op(
    "fsdp_finetune::project4bit",
    mutates_args=(),
    schema="(Tensor codes, Tensor scales, Tensor? table, str quantizer, int[] shape, Tensor a) -> Tensor",
)
def project4bit(codes, scales, table, quantizer, shape, a):
    """W a^T for a packed W: [O, R] from a [R, I], in its dtype. Without a gradient."""
    return F.linear(dequantize((codes, scales, table), quantizer, shape, a.dtype), a)


@project4bit.register_fake
def _(codes, scales, table, quantizer, shape, a):
    return a.new_empty(shape[0], a.shape[0])


@torch.library.custom_op("fsdp_finetune::kept", mutates_args=(), schema="(Tensor x) -> Tensor")
def kept(x):
    """x, by a name that a checkpointing policy knows: not to be computed again. Without a gradient."""
    return x.clone()


@kept.register_fake
def _(x):
    return torch.empty_like(x)
