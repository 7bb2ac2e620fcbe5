"""Routed experts as a list of plain MLPs, as the checkpoint's files hold them, and their stacks.

transformers 5 holds a layer's experts as 3-D parameters, stacked from the files' tensors, one per expert and
linear. Here a model is built with a list, whose parameters have the files' names, so that each linear is
checked, planned and given a quantizer like any other. models/experts.py replaces the lists by stacks, which
run. The list computes the same, expert by expert; tests compare with it.

Shapes: T tokens, K experts per token, H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized

import torch
from torch import nn
from transformers import PreTrainedModel

from models.family import ATTENTION, GATED_MLP

# A stack -> the linears of one expert that are its members.
MEMBERS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
STACK_OF = {linear: stack for stack, linears in MEMBERS.items() for linear in linears}


class Experts(nn.ModuleList):
    """Replaces a transformers module of experts; same arguments, same result.

    make_expert: builds one expert [rows, H] -> [rows, H]; top_k: experts per token, only checked. Raises
    ValueError if there are fewer experts than top_k.
    """

    def __init__(self, make_expert: Callable[[], nn.Module], count: int, top_k: int):
        if not 1 <= top_k <= count:
            raise ValueError(f"{top_k} experts per token, of {count}")
        super().__init__(make_expert() for _ in range(count))

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the results of each token's experts: [T, H].

        x: [T, H]; index [T, K]: each token's experts; weights [T, K]: the weight of each.
        """
        order = index.flatten().argsort(stable=True)  # [T * K]: the first expert's rows, the second's, ...
        counts = index.flatten().bincount(minlength=len(self)).tolist()
        rows = x[order // index.shape[1]].split(counts)
        y = torch.cat([e(r) for e, r in zip(self, rows, strict=True) if len(r) or _is_trained(e)])
        y = y[order.argsort()].unflatten(0, index.shape)  # [T, K, H], in the tokens' order
        # A sum over K always adds in the same order; on a GPU, index_add_ into [T, H] would not. Mixtral's
        # weights are in fp32, also in a model in 16 bits.
        return (y * weights[..., None]).sum(1).to(x.dtype)


def _is_trained(expert: nn.Module) -> bool:
    """Return whether an expert is trained, and so must run even without rows.

    Then its gradient is zero, not missing. FSDP reduces the parameters that have a gradient, and these must
    be the same on every rank.
    """
    return any(p.requires_grad for p in expert.parameters())


def replace_experts(text_model: PreTrainedModel, make_expert: Callable[[], nn.Module]) -> None:
    """Replace transformers' stacked experts by lists of MLPs, whose parameters are the files' tensors.

    A layer has experts if its `mlp` has them. make_expert: see `Experts`; its linears are those of GATED_MLP.
    """
    top_k = text_model.config.num_experts_per_tok
    for layer in text_model.get_submodule("layers").children():
        if hasattr(layer.mlp, "experts"):
            count = layer.get_submodule("mlp.experts").num_experts
            assert isinstance(count, int)
            layer.mlp.experts = Experts(make_expert, count, top_k)


def select_linears(layer: nn.Module) -> tuple[str, ...]:
    """Return the linears of attention and of all experts, or of the plain MLP in a layer without experts."""
    return ATTENTION + mlp_linears(layer)


def mlp_linears(layer: nn.Module, shared: str = "") -> tuple[str, ...]:
    """Return the linears of all experts, or of the plain MLP in a layer without experts.

    shared: name of the expert in `mlp` that all tokens share, whose linears come last; empty without one.
    """
    experts = getattr(layer.mlp, "experts", None)
    if experts is None:
        return GATED_MLP
    assert isinstance(experts, Sized)  # a list or, later, stacks (models/experts.py)
    projections = [linear.removeprefix("mlp.") for linear in GATED_MLP]
    routed = tuple(f"mlp.experts.{i}.{p}" for i in range(len(experts)) for p in projections)
    return routed + tuple(f"mlp.{shared}.{p}" for p in projections if shared)


def find_stack(tensor: str) -> tuple[str, int] | None:
    """Return (the stacked tensor's name, members of an expert) for a checkpoint's tensor of an expert.

    None for any other tensor. Of `mlp.experts.3.up_proj.weight` it is (`mlp.experts.gate_up.weight`, 2).
    """
    path, _, below = tensor.rpartition(".experts.")
    match below.split("."):
        case [expert, linear, parameter] if path and expert.isdecimal() and linear in STACK_OF:
            stack = STACK_OF[linear]
            return f"{path}.experts.{stack}.{parameter}", len(MEMBERS[stack])
    return None


def member_names(stack: str, experts: int) -> Iterator[str]:
    """Yield the names of a stack's members below the experts, in order, such as `3.up_proj`."""
    for expert in range(experts):
        yield from (f"{expert}.{linear}" for linear in MEMBERS[stack])
