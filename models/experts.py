"""The routed experts of a layer as one module, whose linears are stacked (quantization/stacked.py).

`stack_experts` makes it from a list of plain MLPs, which have the names of the checkpoint's tensors
(models/moe.py).

Shapes: T tokens, K experts per token, E experts, H hidden features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from models.moe import MEMBERS, STACK_OF, Experts, member_names
from options.errors import UserError
from quantization.grouped_operators import gather_rows, sort_by_expert
from quantization.layer import (
    ConvertingModule,
    Part,
    convert_tensor,
    parameters_from,
    part_of,
    quantizer_for,
    stored_shape,
)
from quantization.operator_registry import compute_dtype
from quantization.quantizers import PackedWeight, Quantizer
from quantization.stacked import StackedLinear, StackedLinear4bit


class GatedProduct(nn.Module):
    """What most experts compute between their linears: act(gate) * up."""

    def __init__(self, act_fn: nn.Module):
        super().__init__()
        self.act_fn = act_fn

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(gate) * up


class StackedExperts(ConvertingModule):
    """The experts of a layer; the same arguments and results as transformers' own module.

    Args:
        gate_up, down: a StackedLinear, or a StackedLinear4bit, of all experts.
        product: computes (gate, up) -> the input of `down`.
        experts: E.
    """

    def __init__(self, gate_up: nn.Module, down: nn.Module, product: nn.Module, experts: int):
        super().__init__()
        self.gate_up, self.down, self.product, self.experts = gate_up, down, product, experts

    def __len__(self) -> int:
        return self.experts

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the results of each token's experts: [T, H].

        x: [T, H]; index [T, K]: each token's experts; weights [T, K]: the weight of each.
        """
        order, inverse, offsets = sort_by_expert(index, self.experts)
        rows = gather_rows(x.to(compute_dtype(x)), order, inverse, index.shape[1])
        gate, up = self.gate_up(rows, offsets).chunk(2, -1)
        y = self.down(self.product(gate, up), offsets)
        y = gather_rows(y, inverse, order, 1).unflatten(0, index.shape)  # [T, K, H], in the tokens' order
        # A sum over K always adds in the same order; on a GPU, index_add_ into [T, H] would not. Mixtral's
        # weights are in fp32, also in a model in 16 bits.
        return (y * weights[..., None]).sum(1).to(x.dtype)

    def _locate(self, name: str) -> tuple[str, nn.Module, str]:
        """Return (stack, its module, name there) of a tensor, such as `3.up_proj.weight`."""
        expert, linear, last = name.split(".")
        stack = STACK_OF[linear]
        member = int(expert) * len(MEMBERS[stack]) + MEMBERS[stack].index(linear)
        return stack, self.get_submodule(stack), f"{member}.{last}"

    def parameters_from(self, name: str) -> tuple[str, ...]:
        stack, module, below = self._locate(name)
        return tuple(f"{stack}.{key}" for key in parameters_from(module, below))

    def part_of(self, name: str, parameter: str) -> Part | None:
        _, module, below = self._locate(name)
        return part_of(module, below, parameter.partition(".")[2])

    def stored_shape(self, name: str) -> tuple[int, ...]:
        _, module, below = self._locate(name)
        return stored_shape(module, below)

    def convert_tensor(self, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
        stack, module, below = self._locate(name)
        return {f"{stack}.{key}": value for key, value in convert_tensor(module, below, tensor).items()}

    def quantizer_for(self, name: str) -> Quantizer | None:
        _, module, below = self._locate(name)
        return quantizer_for(module, below)


def expert_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return what the names of the modules within routed experts begin with, for each layer that has some."""
    kinds = Experts, StackedExperts
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))


def check_packed_alike(model: nn.Module, quantizers: Mapping[str, Quantizer], where: str) -> None:
    """Raise UserError if linears that get stacked have different quantizers.

    Args:
        model: from `build_on_meta`.
        quantizers: {linear's name: its quantizer}; the others stay dense.
        where: begins the message.
    """
    for path, experts in model.named_modules():
        for stack in MEMBERS if isinstance(experts, Experts) else ():
            first, *others = (f"{path}.{name}" for name in member_names(stack, len(experts)))
            for name in others:
                if quantizers.get(name) != quantizers.get(first):
                    raise UserError(
                        f"{where}: {name} is packed otherwise than {first}; the experts of a layer must be"
                        " packed alike"
                    )


def stack_experts(
    model: nn.Module, quantizers: Mapping[str, Quantizer], dtype: torch.dtype
) -> dict[str, Quantizer]:
    """Replace each list of experts in a meta model by StackedExperts; return the quantizers of the rest.

    Args:
        model: changed in place; `check_packed_alike` holds. Stacks have the dtypes of the lists' parameters,
            and are trained if they are.
        quantizers: {linear's name: its quantizer}; the others stay dense.
        dtype: of the dequantized weights.
    """
    rest = dict(quantizers)
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts)]
    for path, experts in lists:
        stacks = {stack: _make_stack(path, experts, stack, rest, dtype) for stack in MEMBERS}
        first: Any = experts[0]
        product = getattr(first, "product", None) or GatedProduct(first.act_fn)
        model.set_submodule(path, StackedExperts(stacks["gate_up"], stacks["down"], product, len(experts)))
    return rest


def _make_stack(
    path: str, experts: Experts, stack: str, quantizers: dict[str, Quantizer], dtype: torch.dtype
) -> StackedLinear | StackedLinear4bit:
    """Return a stack of the linears of experts, and remove these from `quantizers`."""
    linears = [experts[0].get_submodule(linear) for linear in MEMBERS[stack]]
    names = [f"{path}.{name}" for name in member_names(stack, len(experts))]
    (quantizer,) = {quantizers.pop(name, None) for name in names}
    if quantizer is None:
        return StackedLinear(linears, len(experts))  # type: ignore[arg-type]
    return StackedLinear4bit(linears, len(experts), dtype, quantizer)  # type: ignore[arg-type]
