"""Linears whose results are fp32 under autocast to fp16, for families whose activations exceed its 65,504.

In Gemma the results of attention's and the MLP's last projections may be that large, and so may the product
of the MLP's gate and up, which is fp32 where one factor is. In OLMo and EXAONE 4 also inputs may be: their
linears read the residual stream without a norm before them. The matmul stays in fp16, which old GPUs need for
their speed (a T4's fp32 is eight times slower). Each token's input is divided by a power of two, and the
result, in fp32, multiplied by it:

    y = s W (x / s)    s: of each token, the power of two for which 1/4 <= ||x / s|| < 1/2; at least 1

Powers of two are exact, and tokens do not depend on one another. An element of the fp16 result is at most
half the norm of a row of W, so it overflows only where such a norm exceeds 131,008. A smaller limit than 1/2
would make the fp16 gradients of the result larger without need.

A wide linear is the same module with another class, as FSDP's `fully_shard` does it: `WideLinear` comes first
among the bases, and its `super()` is the linear's own class. Parameters keep their names, which a module
around the linear would change. Hooks would have to hand the scale from one to the next. A `forward` of each
module's own would be compiled for each layer.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from models.family import Family
from quantization.operator_registry import compute_dtype

EXPONENT_BITS = 0x7F800000  # of an fp32 number


class WideLinear(nn.Module):
    """The first base of a linear's class: [T, I] -> [T, O] in fp32, computed as above by the other base."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the linear's result in fp32. The linear must have no bias, which would be scaled, too."""
        norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True, dtype=torch.float32)
        scale = power_of_two_below(4 * norm)
        return super().forward((x / scale).to(compute_dtype(x))).float() * scale


def power_of_two_below(x: torch.Tensor) -> torch.Tensor:
    """Return the largest power of two that is at most x, but at least 1; x: fp32. NaN becomes infinity."""
    return (x.clamp_min(1).view(torch.int32) & EXPONENT_BITS).view(torch.float32)


def find_wide_linears(model: nn.Module, family: Family) -> list[str]:
    """Return the full names of the linears that `family.wide_linears` names; not of those with a bias.

    model: from `build_on_meta`, before a method changes it.
    """
    names = (
        f"{family.layers}.{i}.{name}"
        for i in range(len(family.decoder_layers(model)))
        for name in family.wide_linears
    )
    return [name for name in names if model.get_submodule(name).bias is None]


def widen_linears(model: nn.Module, names: list[str]) -> None:
    """Make each linear of these names, with its adapter or without, a WideLinear, in place."""
    for name in names:
        module = model.get_submodule(name)
        wide_class = _wide_class(type(module))  # type: ignore[arg-type] # a class is hashable
        module.__class__ = wide_class


@cache
def _wide_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the WideLinear of a class: one for all of its linears, whose layers then share a compilation."""
    return type(f"Wide{cls.__name__}", (WideLinear, cls), {})
