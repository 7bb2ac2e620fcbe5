"""What DoRA computes with a frozen weight: its projection and the norm of each row.

Shapes: O output features, I input features, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quantization import operators
from quantization.operator_registry import register_operator

TINY = torch.finfo(torch.float32).tiny


def factored_norm(projected: Tensor, a: Tensor, b: Tensor, scaling: float, squared_norm: Tensor) -> Tensor:
    """Return ||W + s B A|| of each row: [O], fp32, without a gradient. All may have leading dimensions.

    W + s B A is never materialised, which would round it to W's dtype:

        ||W + s B A||^2 = ||W||^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B)

    Args:
        projected: W A^T [O, R].
        a, b: A [R, I] and B [O, R], in the dtype that they are trained in.
        scaling: s.
        squared_norm: ||W||^2 of each row, [O] fp32.
    """
    exact_a, b = a.float(), b.float()
    # W A^T + s/2 B A A^T: [O, R]. The sum is fp32: where the dtypes differ, torch promotes. s/2 is not the
    # sum's alpha: on a CPU the compiler would make an addmm of that and drop s/2 (similar to pytorch#167313).
    half = projected + b @ (exact_a @ exact_a.mT * (scaling / 2))
    norm = torch.add(squared_norm, (half * b).sum(-1), alpha=2 * scaling)
    return norm.clamp_min(TINY).sqrt()  # rounding may give less than 0 where W = -s B A


def _fake_project4bit(codes, scales, table, quantizer, shape, a):
    return a.new_empty(shape[0], a.shape[0])


@register_operator(
    "(Tensor codes, Tensor scales, Tensor? table, str quantizer, int[] shape, Tensor a) -> Tensor",
    _fake_project4bit,
)
def project4bit(codes, scales, table, quantizer, shape, a):
    """Return W a^T for a packed W: [O, R] in a's dtype. Without a gradient.

    Args:
        codes, scales, table, quantizer: the packed W and its format, as for `dequantize`.
        shape: (O, I).
        a: [R, I].
    """
    return F.linear(operators.dequantize((codes, scales, table), quantizer, shape, a.dtype), a)


@register_operator("(Tensor x) -> Tensor", torch.empty_like)
def mark_saved(x):
    """Return a copy of x, marked by this operator for a checkpointing policy to save. Without a gradient."""
    return x.clone()
