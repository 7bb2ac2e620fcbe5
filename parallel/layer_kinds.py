"""What layers that are alike, and calls that are alike, have in common (parallel/layer_graphs.py)."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parallel.recorded_layer import NotRecordable

RANDOM = re.compile("dropout|pdrop|jitter")  # in names of attributes
PLAIN = int, float, bool, str, type(None), torch.dtype, torch.device


def take_apart(value: Any, tensors: list[Tensor]) -> Hashable:
    """Append the tensors within an argument to `tensors`; return the rest, for comparison and `put_together`.

    Raises NotRecordable for anything but tensors, plain values, and containers and partial functions of them.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return "tensor", value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if isinstance(value, PLAIN):
        return "value", type(value), value
    if type(value) in (tuple, list):
        return type(value), tuple(take_apart(each, tensors) for each in value)
    if type(value) is dict:
        return dict, tuple(value), tuple(take_apart(each, tensors) for each in value.values())
    if type(value) is partial:
        return "partial", value.func, take_apart([*value.args], tensors), take_apart(value.keywords, tensors)
    raise NotRecordable(f"it is given a {type(value).__name__}")


def put_together(parts: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the argument that `take_apart` took apart, with other tensors."""
    kind = parts[0]
    if kind == "tensor":
        return next(tensors)
    if kind == "value":
        return parts[2]
    if kind == "partial":
        args = put_together(parts[2], tensors)
        return partial(parts[1], *args, **put_together(parts[3], tensors))
    values = [put_together(each, tensors) for each in parts[-1]]
    return dict(zip(parts[1], values, strict=True)) if kind is dict else kind(values)


def describe_kind(layer: nn.Module) -> Hashable:
    """Return what layers that are alike have in common: modules, shapes of their tensors, plain attributes.

    A layer's index is not among them: transformers uses it for caches only. Tensors are numbered, because
    modules may share them.
    """
    numbers: dict[Tensor, int] = {}
    return tuple(
        (
            name,
            type(module),
            tuple(
                (n, numbers.setdefault(t, len(numbers)), t.shape, t.dtype, t.device.type, t.requires_grad)
                for n, t in (*module._parameters.items(), *module._buffers.items())
                if t is not None
            ),
            tuple(
                (n, value)
                for n, value in sorted(vars(module).items())
                if isinstance(value, PLAIN) and n != "layer_idx"
            ),
        )
        for name, module in layer.named_modules()
    )


def has_dropout(layer: nn.Module) -> bool:
    """Return whether a module within the layer changes activations at random: drops, or scales them."""
    return any(
        isinstance(value, float) and value > 0 and (name == "p" or RANDOM.search(name))
        for module in layer.modules()
        for name, value in vars(module).items()
    )
