"""How operators are registered with torch, and quantizers with the operators.

An operator is opaque to torch.compile. It takes numbers, strings and tensors only, so a quantizer is passed
by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.library import CustomOpDef

from quantization.quantizers import Quantizer

_QUANTIZERS: dict[str, Quantizer] = {}


def register_quantizer(quantizer: Quantizer) -> str:
    """Register a quantizer for the operators; return its name there, one for equal quantizers."""
    _QUANTIZERS[str(quantizer)] = quantizer
    return str(quantizer)


def quantizer_of(name: str) -> Quantizer:
    """Return the quantizer that is registered by this name."""
    return _QUANTIZERS[name]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a linear computes in: autocast's within autocast, else x's.

    For operators that autocast does not handle.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


_LIBRARY = torch.library.Library("fsdp_finetune", "FRAGMENT")

# Autograd-free twins of the operators, for compiled graphs that are not differentiated any more. The
# dispatcher calls Python for the gradient too, even without one: 70 of a call's 263 us on the host.
WITHOUT_GRADIENT: dict[OpOverload, OpOverload] = {}


def register_operator(schema: str, fake: Callable) -> Callable[[Callable], CustomOpDef]:
    """Return a decorator that registers a function as an operator, and its twin without a gradient.

    schema: of arguments and result, in torch's notation. fake: computes the result's shape and dtype, for
    tensors without contents.
    """

    def register(compute: Callable) -> CustomOpDef:
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

    return register
