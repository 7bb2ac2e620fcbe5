"""The training loop in which the embedded models are pretrained."""

import itertools
import math
import time
from collections.abc import Iterator

import torch


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Return the learning rate of a step relative to its peak: linear warm-up, then a cosine down to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def run_steps(
    model: torch.nn.Module,
    data: Iterator[dict[str, torch.Tensor]],
    steps: int,
    peak_lr: float,
    warmup_steps: int,
) -> float:
    """Train a model with AdamW; return the mean loss of the last 50 steps, in nats per token.

    Args:
        model: a model of transformers, in fp32.
        data: the arguments of its forward, for each step.
        steps: number of steps.
        peak_lr: the highest learning rate.
        warmup_steps: number of steps until it is reached.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, warmup_steps))
    losses, start = [], time.monotonic()
    for step, batch in enumerate(itertools.islice(data, steps)):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {losses[-1]:.4f} {time.monotonic() - start:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])
