"""Shared by the scripts that train in their own process: rows, device, clock."""

from __future__ import annotations

import itertools
import os
import resource
import time

import torch
import torch.distributed as dist
from torch import nn
from work import RANKS, print_result


def token_ids(tokenizer, context_length: int) -> list[int]:
    """Return one row that fills the context: the words of our --dataset dummy."""
    return tokenizer("output " * context_length)["input_ids"][:context_length]


def select_device() -> torch.device:
    """Return this rank's GPU, made torch's current one, or the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Stopwatch:
    """Times the steps of a model and counts its input tokens."""

    def __init__(self, model: nn.Module):
        self.model, self.ends, self.tokens = model, [], 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.tokens += (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()

    def end_step(self) -> None:
        """Record the end of a step. Waits for the GPU."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def print_result(self) -> None:
        """Print the result line of work.py, on rank 0. Collective."""
        gpu = torch.cuda.is_available()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        peak = torch.cuda.max_memory_allocated() if gpu else resident
        peaks = [peak] * RANKS
        if RANKS > 1:
            dist.all_gather_object(peaks, peak)
        trained = {str(p.dtype).removeprefix("torch.") for p in self.model.parameters() if p.requires_grad}
        print_result(
            step_seconds=[b - a for a, b in itertools.pairwise(self.ends)],
            tokens=self.tokens / len(self.ends) * RANKS,
            peak_gib=max(peaks) / 2**30,
            adapters=" and ".join(sorted(trained)),
        )
