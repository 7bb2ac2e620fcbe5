"""Calls of a model's modules in one forward pass, and the first in which two models differ.

Shapes: B sequences of a batch, T tokens of a sequence, H hidden features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.family import unwrapped_name

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))  # [B, T]; windows have 16
MAX_REASON = 150  # characters of another library's message
ROUNDING = 2e-5  # relative to the largest element: two orders of the same sums, in fp32


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: the module's dotted name, without wrappers of activation checkpointing.
        module: the module.
        args, kwargs: its arguments.
        output: its result.
    """

    name: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any

    @property
    def result(self) -> Tensor | None:
        """The first tensor of the output."""
        return first_tensor(self.output)

    @property
    def input(self) -> Tensor | None:
        """The first tensor of the arguments: the hidden states."""
        return first_tensor([*self.args, *self.kwargs.values()])

    def repeat(self, module: nn.Module | None = None) -> Tensor:
        """Call the module, or another one, with the same arguments; return the first tensor of its output."""
        with torch.no_grad():
            called = self.module if module is None else module  # a compiled module has no truth value
            result = first_tensor(called(*self.args, **self.kwargs))
        assert result is not None
        return result


def first_tensor(value: Any) -> Tensor | None:
    """Return the value if it is a tensor, or the first tensor of a sequence or of a model's output."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = list(value.values())
    return (
        next((x for x in value if isinstance(x, Tensor)), None) if isinstance(value, list | tuple) else None
    )


def record_calls(model: nn.Module, ids: Tensor = IDS) -> tuple[list[Call], Tensor]:
    """Return (the calls of all modules of a forward pass, in the order in which they ended, the logits)."""
    calls: list[Call] = []
    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, output, name=name: calls.append(
                Call(unwrapped_name(name), module, args, kwargs, output)
            ),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


def first_difference(ours: nn.Module, theirs: nn.Module) -> str | None:
    """Return a description of the first module whose result differs in the two models; None if none does.

    A module ends before those that contain it, so the first one is the smallest part that differs.
    """
    found = {call.name: call for call in record_calls(ours)[0]}
    for call in record_calls(theirs)[0]:
        own = found.get(call.name)
        if own is None or own.result is None or call.result is None:
            continue
        if not is_close(own.result, call.result):
            return (
                f"{call.name} ({type(call.module).__name__}): {largest_difference(own.result, call.result)}"
            )
    return None


def is_close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of fp32 in their largest elements."""
    if a.shape != b.shape:
        return False
    a, b = a.float(), b.float()
    return torch.allclose(a, b, rtol=0, atol=ROUNDING * b.abs().max().item())


def largest_difference(a: Tensor, b: Tensor) -> str:
    """Return the shapes of two tensors if they differ, else the largest difference of their elements."""
    if a.shape != b.shape:
        return f"shape {list(a.shape)} instead of {list(b.shape)}"
    difference = (a.float() - b.float()).abs().max().item()
    return f"differs by up to {difference:.2g}, of values up to {b.float().abs().max().item():.2g}"
