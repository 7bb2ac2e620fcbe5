"""The routers of experts, trained in full beside an adapter (--train_router; PEFT: modules_to_save).

A router is the module beside a layer's experts that chooses them. Its trained weight has the dtype of
adapters, and computes in that of the hidden states, as the frozen one does: transformers' forward reads the
cast weight, by a property of the router's class.
"""

from __future__ import annotations

from collections.abc import Sized
from functools import cache

import torch
from torch import nn

from models.family import unwrapped_name

NAMES = ("gate", "router")  # of routers, beside `experts`
TRAINED = ("weight", "bias")  # GLM's other parameter is fixed


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Return {dotted name: module} of the routers of a model, wrapped or not."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), Sized):
            name = router_name(module)
            found[f"{unwrapped_name(path)}.{name}"] = getattr(module, name)
    return found


def router_name(block: nn.Module) -> str:
    """Return the name of the router in a block of experts."""
    return next(name for name in NAMES if hasattr(block, name))


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return {dotted name: parameter} of what --train_router trains in a model."""
    return {
        f"{path}.{name}": parameter
        for path, router in find_routers(model).items()
        for name, parameter in router.named_parameters(recurse=False)
        if name in TRAINED
    }


def peft_routers(model: nn.Module) -> list[str]:
    """Return PEFT's names of the routers, for modules_to_save."""
    return list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in find_routers(model)))


def cast_in_forward(router: nn.Module, dtype: torch.dtype) -> None:
    """Let a router's forward read its weight, and its bias, in `dtype`. Parameters stay as they are."""
    names = tuple(name for name, _ in router.named_parameters(recurse=False) if name in TRAINED)
    router.__class__ = _casting_class(type(router), names, dtype)  # type: ignore[arg-type] # hashable


@cache
def _casting_class(cls: type[nn.Module], names: tuple[str, ...], dtype: torch.dtype) -> type[nn.Module]:
    """Return the class of a router whose attributes `names` are its parameters in `dtype`."""

    def cast(name: str) -> property:
        return property(lambda self: self._parameters[name].to(dtype))

    return type(f"Casting{cls.__name__}", (cls,), {name: cast(name) for name in names})
