"""Routed experts as a list of plain MLPs, as the checkpoint's files hold them.

transformers 5 keeps the experts of a layer as 3-D parameters, which it stacks from the files' one tensor per
expert and linear. As a list their names are the files' names, and each linear is quantized, streamed, checked
and saved like any other.

Shapes: T tokens, K experts per token, H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Experts(nn.ModuleList):
    """Takes the place of a transformers module of experts; same arguments, same result.

    make: builds one expert [rows, H] -> [rows, H]; top_k: experts per token, only checked. Raises ValueError if
    there are fewer experts.
    """

    def __init__(self, make: Callable[[], nn.Module], count: int, top_k: int):
        if not 1 <= top_k <= count:
            raise ValueError(f"{top_k} experts per token, of {count}")
        super().__init__(make() for _ in range(count))

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts: [T, H]. x: [T, H]; index, weights: [T, K]."""
        order = index.flatten().argsort(stable=True)  # [T K]: the first expert's rows, the second's, ...
        counts = index.flatten().bincount(minlength=len(self)).tolist()
        rows = x[order // index.shape[1]].split(counts)
        y = torch.cat([e(r) for e, r in zip(self, rows, strict=True) if len(r) or _trained(e)])
        y = y[order.argsort()].unflatten(0, index.shape)  # [T, K, H], in the tokens' order again
        # A sum over K adds in the same order each time; index_add_ into [T, H] would not on a GPU.
        return (y * weights[..., None]).sum(1)


def _trained(expert: nn.Module) -> bool:
    """A trained expert runs with no rows too: then its gradient is zero, not missing. FSDP reduces what has a
    gradient, and that must be the same parameters on every rank."""
    return any(p.requires_grad for p in expert.parameters())


def within_experts(model: nn.Module, name: str) -> bool:
    """Whether the module of that dotted name lies within an Experts."""
    path = name.split(".")
    return any(isinstance(model.get_submodule(".".join(path[:i])), Experts) for i in range(1, len(path)))
