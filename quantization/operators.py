"""The 4-bit matmul and its gradient as operators that torch.compile takes whole.

Opaque to the compiler on purpose: it would merge the backward's dequantization with the forward's, and keep
16-bit weights in between. As operators they can be named by a checkpointing policy
(parallel/activation_checkpointing.py), and each takes its low-rank branch into the big matmul, or adds it to
the result in place.

Shapes: O output features, I input features, R rank, T tokens (all leading dimensions of x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.library import CustomOpDef

from quantization.quantizers import Quantizer

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


def dequantize(
    packed: tuple, quantizer: str, shape: Sequence[int], dtype, row_scale=None, out=None
) -> Tensor:
    """`Quantizer.dequantize` of (codes, scales, table) with codes and scales in float storage."""
    codes, scales, table = packed
    raw = codes.view(torch.uint8), scales.view(torch.uint8)
    return _QUANTIZERS[quantizer].dequantize(*raw, table, tuple(shape), dtype, row_scale, out)


def _widens(x: Tensor, quantizer: str, shape: list[int], rank: int) -> bool:
    """Whether the low-rank branch goes through the large matmul, as columns beside the weight's and x's: where the
    output is several times x it costs less to copy x than to write the output once more."""
    whole_rows = shape[1] % _QUANTIZERS[quantizer].block == 0
    aligned = (shape[1] + rank) % 8 == 0  # to 16 bytes, which fast matmuls need
    return x.is_cuda and shape[0] >= 2 * shape[1] and whole_rows and aligned


_LIBRARY = torch.library.Library("fsdp_finetune", "FRAGMENT")

# Of each operator the same without a gradient, for graphs that are compiled and not differentiated any more: the dispatcher
# goes through Python for the gradient as well, whether there is one or not, which is 70 of a call's 263 us of the host.
WITHOUT_GRADIENT: dict[OpOverload, OpOverload] = {}


def _operator(schema: str, fake: Callable) -> Callable[[Callable], CustomOpDef]:
    """Makes an operator, and its twin without a gradient, out of what computes it. fake: the same for tensors that have
    no contents."""

    def make(compute: Callable) -> CustomOpDef:
        name = f"fsdp_finetune::{compute.__name__}"
        operator = torch.library.custom_op(name, compute, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        twin = f"{compute.__name__}_without_gradient"
        _LIBRARY.define(twin + schema)
        _LIBRARY.impl(twin, compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fsdp_finetune::{twin}", fake, lib=_LIBRARY)
        ops = torch.ops.fsdp_finetune
        WITHOUT_GRADIENT[getattr(ops, compute.__name__).default] = getattr(ops, twin).default
        return operator

    return make


_PACKED = "Tensor codes, Tensor scales, Tensor? table, str quantizer, int[] shape, Tensor? row_scale"


def _fake_linear4bit(x, codes, scales, table, quantizer, shape, row_scale, bias, h, a, b, keep):
    return x.new_empty(*x.shape[:-1], shape[0])


@_operator(
    f"(Tensor x, {_PACKED}, Tensor? bias, Tensor? h, Tensor? a, Tensor? b, bool keep) -> Tensor",
    _fake_linear4bit,
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
    packed = (codes, scales, table), quantizer, shape, x.dtype, row_scale
    if h is None:
        return F.linear(x, dequantize(*packed), bias)
    if _widens(x, quantizer, shape, h.shape[-1]):
        both = x.new_empty(shape[0], shape[1] + h.shape[-1])
        dequantize(*packed, out=both[:, : shape[1]])
        both[:, shape[1] :] = b
        # h may be a part of several linears' (parallel/inductor_passes.py); unless all is contiguous torch copies five times
        # as slowly.
        return F.linear(torch.cat((x, h.contiguous()), -1), both, bias)
    weight = dequantize(*packed)
    # The large matmul adds into the small one's result: it has time to read it, which a small one has not.
    y = F.linear(h, b, bias)
    y.view(-1, shape[0]).addmm_(x.flatten(0, -2), weight.t())
    return y


# The two operators of backward take any number of linears that have one x: the compiler's graphs are rewritten so
# (parallel/inductor_passes.py), and what each of them did alone with x and its gradient is done once.


def _fake_adapter_backward(grads, x, h, a, b):
    rank = sum(each.shape[1] for each in b)
    of_a = x.new_empty(rank, x.shape[-1]) if a else h[0].new_empty(0)
    return [h[0].new_empty(*h[0].shape[:-1], rank), of_a, *(torch.empty_like(each) for each in b)]


@_operator(
    "(Tensor[] grads, Tensor? x, Tensor[] h, Tensor[] a, Tensor[] b) -> Tensor[]", _fake_adapter_backward
)
def adapter_backward(grads, x, h, a, b):
    """[The gradient of all h, side by side [T, sum of R]; of all a, one below the other [sum of R, I], empty without
    a; of each b [O, R]]. grads: [T, O] each.

    An operator of its own, before that of the big matmuls, which needs the first of them: x, which may be an activation
    of a quarter of a GiB, is let go before its gradient is made.
    """
    ranks = [each.shape[1] for each in b]
    of_h = h[0].new_empty(*h[0].shape[:-1], sum(ranks))
    for grad, each, part in zip(grads, b, of_h.flatten(0, -2).split(ranks, 1), strict=True):
        torch.mm(grad.flatten(0, -2), each, out=part)
    of_a = of_h.flatten(0, -2).t() @ x.flatten(0, -2) if a else of_h.new_empty(0)
    return [
        of_h,
        of_a,
        *(g.flatten(0, -2).t() @ each.flatten(0, -2) for g, each in zip(grads, h, strict=True)),
    ]


def _fake_linear4bit_backward(grads, codes, scales, tables, quantizers, shapes, row_scales, of_h, a, after):
    return grads[0].new_empty(*grads[0].shape[:-1], shapes[1])


@_operator(
    "(Tensor[] grads, Tensor[] codes, Tensor[] scales, Tensor?[] tables, str[] quantizers, int[] shapes,"
    " Tensor?[] row_scales, Tensor? of_h, Tensor[] a, Tensor[] after) -> Tensor",
    _fake_linear4bit_backward,
)
def linear4bit_backward(grads, codes, scales, tables, quantizers, shapes, row_scales, of_h, a, after):
    """The gradient of x [T, I]. grads: [T, O] each; shapes: O, I, O, I, ...; of_h [T, sum of R] and a [R, I] each: what
    comes by way of h, unless there is no a.

    after: is not looked at. It is what a compiler has to have computed before, and not when it likes: what that needs
    could otherwise stay in memory while the layers below are gone through.
    """
    of_x = of_h.flatten(0, -2) @ (a[0] if len(a) == 1 else torch.cat(a)) if a else None
    each = zip(codes, scales, tables, strict=True), quantizers, zip(shapes[::2], shapes[1::2], strict=True)
    for grad, packed, quantizer, shape, row_scale in zip(grads, *each, row_scales, strict=True):
        weight, rows = dequantize(packed, quantizer, shape, grad.dtype, row_scale), grad.flatten(0, -2)
        of_x = rows @ weight if of_x is None else of_x.addmm_(rows, weight)
        del weight  # before the next one is made
    assert of_x is not None
    return of_x.view(*grads[0].shape[:-1], shapes[1])


def _setup(ctx, inputs, output) -> None:
    x, codes, scales, table, ctx.quantizer, ctx.shape, row_scale, _, h, a, b, _ = inputs
    y = None if row_scale is None else output
    ctx.save_for_backward(x if a is not None else None, codes, scales, table, row_scale, h, a, b, y)


def _backward(ctx, grad):
    x, codes, scales, table, row_scale, h, a, b, y = ctx.saved_tensors
    packed = [codes], [scales], [table], [ctx.quantizer], ctx.shape, [row_scale]
    of_h = of_a = of_b = of_x = of_scale = None
    low_rank = [] if a is None else [a]
    if h is not None:
        of_h, of_a, of_b = adapter_backward([grad], x, [h], low_rank, [b])
    if row_scale is not None:  # the derivative by g is W x = (y - h b^T) / g
        rows = grad.flatten(0, -2)
        if grad.dtype == torch.float16:  # scaled gradients times outputs may pass its largest number
            rows = rows.float()
        of_scale = (rows * y.flatten(0, -2)).sum(0, dtype=torch.float32)
        if of_b is not None:
            of_scale = of_scale - (of_b.float() * b.float()).sum(1)
        of_scale = of_scale / row_scale
    if ctx.needs_input_grad[0]:  # last: before it x and y are let go, which may be the widest activations
        after = [] if of_scale is None else [of_scale]
        of_x = linear4bit_backward([grad], *packed, of_h, low_rank, after)
    through_h = h is not None and a is None
    return (
        of_x,
        *(None, None, None, None, None),
        of_scale,
        None,
        of_h if through_h else None,
        None if through_h else of_a,
        of_b,
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
    # W A^T + s/2 B A A^T: [O, R]. The sum is fp32: where the dtypes differ, torch promotes. s/2 is no alpha of the sum:
    # on a CPU the compiler makes an addmm of that and drops it (of the kind of pytorch#167313).
    half = projected + b @ (exact_a @ exact_a.t() * (scaling / 2))
    norm = torch.add(squared_norm, (half * b).sum(1), alpha=2 * scaling)
    return norm.clamp_min(TINY).sqrt()  # rounding may leave less than 0 where W = -s B A


def _fake_project4bit(codes, scales, table, quantizer, shape, a):
    return a.new_empty(shape[0], a.shape[0])


@_operator(
    "(Tensor codes, Tensor scales, Tensor? table, str quantizer, int[] shape, Tensor a) -> Tensor",
    _fake_project4bit,
)
def project4bit(codes, scales, table, quantizer, shape, a):
    """W a^T for a packed W: [O, R] from a [R, I], in its dtype. Without a gradient."""
    return F.linear(dequantize((codes, scales, table), quantizer, shape, a.dtype), a)


@_operator("(Tensor x) -> Tensor", torch.empty_like)
def kept(x):
    """x, by a name that a checkpointing policy knows: not to be computed again. Without a gradient."""
    return x.clone()
