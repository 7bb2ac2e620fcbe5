"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adadelta": torch.optim.Adadelta,
}


def make_optimizer(
    params: Iterable[nn.Parameter], name: str, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """torch's optimizer with torch's defaults over the trained parameters. Weight decay acts on matrices
    only: vectors are norms, biases and DoRA magnitudes, which have nothing to gain from being small."""
    params = [p for p in params if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name]([g for g in groups if g["params"]], lr=lr)


def lr_factor(step: int, total: int, warmup: float, kind: str) -> float:
    """The share of the peak learning rate at a step (from 0): a linear rise over the first
    round(warmup * total) steps, then constant, linear to 0, or a half cosine to a tenth."""
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(total - rise, 1)  # 0 at the peak, 1 after the last step
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.55 + 0.45 * math.cos(math.pi * done)}[kind]


def make_schedule(
    optimizer: torch.optim.Optimizer, total: int, warmup: float, kind: str
) -> torch.optim.lr_scheduler.LRScheduler:
    """`lr_factor` as a scheduler of torch's: step() after each optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, total, warmup, kind))
