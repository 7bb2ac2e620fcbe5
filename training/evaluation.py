"""Validation loss and greedy answers of a model that is being trained, sharded or not.

Every rank goes through the same forward passes: FSDP's collectives need all ranks. Afterwards the model is as
it was, and no random generator has been drawn from.

Shapes: R rows, P prompts, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from data.batches import Batch, make_batch
from data.rows import TokenizedRows
from launch.ranks import RankInfo
from models.family import longrope_threshold

PROMPTS_AT_ONCE = 8


LossSum = Callable[[nn.Module, Batch], torch.Tensor]


Context = Callable[[], contextlib.AbstractContextManager]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is as it was: in its mode, and sharded, where a
    strategy would have kept it gathered for a backward that does not come."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        model.train(training)


def mean_loss(
    model: PreTrainedModel,
    rows: TokenizedRows,
    batch_size: int,
    loss_sum: LossSum,
    rank_info: RankInfo,
    context: Context,
) -> float:
    """Cross-entropy per target of all rows. Collective.

    The batches are the same on any number of ranks, which take turns, and their sums meet each in a place of
    its own: the result depends on the number of ranks only as far as the kernels do. The longest come first,
    so that what does not fit into memory shows at once; a rank that is left without a batch takes one of
    nothing but padding.
    """
    lengths = rows.lengths()
    parts = grouped(lengths, batch_size, longrope_threshold(model.config))
    rounds = [part[i : i + rank_info.world] for part in parts for i in range(0, len(part), rank_info.world)]
    targets = rows.targets()
    sums, done = torch.zeros(sum(map(len, rounds)), dtype=torch.float64, device=rank_info.device), 0
    with evaluating(model):
        for batches in rounds:
            own = rank_info.rank < len(batches)
            indices = batches[rank_info.rank] if own else batches[0][:0]
            longest = int(lengths[batches[0][0]])
            most = max(int(targets[each].sum()) for each in batches)
            batch = make_batch(rows, indices, (len(batches[0]), longest), most).to(rank_info.device)
            with context():
                total = loss_sum(model, batch)
            if own:
                sums[done + rank_info.rank] = total
            done += len(batches)
    if rank_info.world > 1:
        dist.all_reduce(sums)
    return sums.sum().item() / int(targets.sum())


def grouped(lengths: torch.Tensor, size: int, switch: float, growth: int = 0) -> list[list[torch.Tensor]]:
    """Numbers of the rows [R] that are computed together, at most `size`, the longest first, so that each
    gives what it gives alone: in parts that the model's `longrope_threshold` keeps apart, the rows above it, those
    that may pass it while they grow by `growth` tokens, each by itself, and those that stay below."""
    order = lengths.argsort(descending=True, stable=True)
    before, after = lengths[order], lengths[order] + growth
    parts = (before > switch, size), ((before <= switch) & (after > switch), 1), (after <= switch, size)
    return [list(order[rows].split(most)) for rows, most in parts if rows.any()]


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def greedy(
    model: nn.Module,
    prompts: list[list[int]],
    tokens: int,
    stops: Collection[int],
    rank_info: RankInfo,
    context: Context,
) -> list[list[int]]:
    """The likeliest answer of at most `tokens` tokens to each prompt, without the token of `stops` that ended
    it. Collective.

    Each forward computes all prompts from their start, padded on the right: without a cache, because what
    costs time under FSDP is to gather the weights, once per token either way. Every rank computes the same;
    rank 0's choice counts, so that all of them end together even if their GPUs should round differently.
    """
    rows = [list(p) for p in prompts]
    waiting = set(range(len(rows)))
    with evaluating(model):
        for _ in range(tokens):
            lengths = torch.tensor([len(r) for r in rows])
            ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
            positions, which = (lengths - 1).unique(return_inverse=True)
            with context():
                logits = model(
                    input_ids=ids.to(rank_info.device),
                    use_cache=False,
                    logits_to_keep=positions.to(rank_info.device),
                ).logits  # [P, positions, V]
            chosen = logits[torch.arange(len(rows)), which].argmax(-1)  # [P]
            if rank_info.world > 1:
                dist.broadcast(chosen, 0)
            for i, token in enumerate(chosen.tolist()):
                if i in waiting:
                    rows[i].append(token)
                    if token in stops:
                        waiting.discard(i)
            if not waiting:
                break
    answers = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    return [a[:-1] if a and a[-1] in stops else a for a in answers]
