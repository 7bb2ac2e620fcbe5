"""Validation loss and greedy answers of a model during training, sharded or not.

Every rank runs the same forward passes: FSDP's collectives need all ranks. The model is unchanged afterwards,
and no random numbers are drawn.

Shapes: R rows, P prompts, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from data.batches import Batch, make_batch
from data.image_batches import ImageBatch, plan_images
from data.prefetch import load_images
from data.rows import TokenizedRows
from launch.ranks import RankInfo, errors_on_all_ranks, resolve_workers
from models.family import longrope_threshold

PROMPT_BATCH_SIZE = 8

LossSum = Callable[[nn.Module, Batch], torch.Tensor]
Context = Callable[[], contextlib.AbstractContextManager]


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode without gradients, then restore the model's mode and sharding.

    Some strategies leave units gathered after forward, for a backward that does not come here.
    """
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
    most_tokens: float = math.inf,
) -> float:
    """Return the mean cross-entropy per target over all rows, the same on all ranks. Collective.

    The batches are the same for any number of ranks, which take turns. Each batch's sum has its own element
    of the reduced tensor, so the result depends on the number of ranks only as far as the kernels do. The
    longest rows come first, so that a lack of memory shows at once. A rank without a batch in a round
    computes a batch of padding, with a blank image if another rank has images. Raises UserError, on all
    ranks, if one of them cannot read an image.

    Args:
        model: the model, sharded or not.
        rows: the rows to evaluate on.
        batch_size: rows of a rank's batch.
        loss_sum: loss_sum(model, batch) returns the summed cross-entropy.
        rank_info: this process.
        context: context() is entered around every forward.
        most_tokens: of a batch, padding included; longer rows make smaller batches.
    """
    lengths = rows.lengths()
    groups = group_rows(lengths, batch_size, longrope_threshold(model.config), most_tokens=most_tokens)
    world = rank_info.world
    rounds = [group[i : i + world] for group in groups for i in range(0, len(group), world)]
    targets = rows.targets()
    sums, done = torch.zeros(sum(map(len, rounds)), dtype=torch.float64, device=rank_info.device), 0
    threads = ThreadPoolExecutor(resolve_workers(-1, rank_info.cpus))  # it starts those that are needed
    with eval_mode(model), threads:
        for batches in rounds:
            has_batch = rank_info.rank < len(batches)
            indices = batches[rank_info.rank] if has_batch else batches[0][:0]
            shape = len(batches[0]), int(lengths[batches[0][0]])
            max_targets = max(int(targets[each].sum()) for each in batches)
            batch = _load_batch(rows, indices, shape, max_targets, torch.cat(batches), threads, world)
            with context():
                total = loss_sum(model, batch.to(rank_info.device))
            if has_batch:
                sums[done + rank_info.rank] = total
            done += len(batches)
    if world > 1:
        dist.all_reduce(sums)
    return sums.sum().item() / int(targets.sum())


def _load_batch(
    rows: TokenizedRows,
    indices: torch.Tensor,
    shape: tuple[int, int],
    n_positions: int,
    all_rows: torch.Tensor,
    threads: ThreadPoolExecutor,
    world: int,
) -> Batch:
    """Return a rank's batch of a round, with its images. Collective, if any row of the set has an image.

    Args:
        rows, indices, shape, n_positions: as for `make_batch`.
        all_rows: the rows of all ranks in the round.
        threads: decode the images.
        world: number of ranks.

    Raises UserError, on all ranks, if one of them cannot read an image.
    """
    images = plan_images(rows, indices[:, None].tolist(), shape, all_rows)
    batch = replace(make_batch(rows, indices, shape, n_positions), planned_images=images)
    if rows.images.refs:
        with errors_on_all_ranks(world):
            batch = load_images([batch], threads)[0]
    return batch


def group_rows(
    lengths: torch.Tensor,
    batch_size: int,
    rope_threshold: float,
    max_growth: int = 0,
    most_tokens: float = math.inf,
) -> list[list[torch.Tensor]]:
    """Return batches of row indices, in groups by length, so that a batch changes no row's result.

    The groups are: rows above `rope_threshold`; rows that may pass it while they grow, one a batch; rows that
    stay below. Each is divided by the rows of a batch that `most_tokens` allows: all batches of a group have
    the same number of rows, but the last. The longest rows come first.

    Args:
        lengths: [R] tokens of each row.
        batch_size: most rows of a batch.
        rope_threshold: the model's `longrope_threshold`: a longer row changes the rotation of its whole
            batch.
        max_growth: tokens by which a row may grow.
        most_tokens: of a batch, padding included; a batch of one row may have more.
    """
    order = lengths.argsort(descending=True, stable=True)
    before, after = lengths[order], lengths[order] + max_growth
    groups = (
        (before > rope_threshold, batch_size),
        ((before <= rope_threshold) & (after > rope_threshold), 1),
        (after <= rope_threshold, batch_size),
    )
    return [
        list(rows.split(size))
        for mask, rows_at_once in groups
        for rows, size in _limit_tokens(order[mask], lengths, rows_at_once, most_tokens)
    ]


def _limit_tokens(
    order: torch.Tensor, lengths: torch.Tensor, batch_size: int, most_tokens: float
) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield (rows, rows of a batch of them): the batch size is halved for rows that are too long for it.

    Few sizes make few groups, and so few ranks without a batch.

    Args:
        order: [R] indices of rows, the longest first.
        lengths: tokens of each row.
        batch_size: most rows of a batch.
        most_tokens: as for `group_rows`.
    """
    sizes = [batch_size >> halvings for halvings in reversed(range(batch_size.bit_length()))]  # 1, 2, 5
    for size, larger in zip(sizes, [*sizes[1:], 0], strict=True):
        count = int((lengths[order] * larger > most_tokens).sum()) if larger else len(order)
        if count:
            yield order[:count], size
        order = order[count:]


def perplexity(loss: float) -> float:
    """Return exp(loss); infinity where that may overflow, NaN for NaN."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def generate_greedily(
    model: nn.Module,
    prompts: list[list[int]],
    max_tokens: int,
    stop_ids: Collection[int],
    rank_info: RankInfo,
    context: Context,
    images: ImageBatch | None = None,
) -> list[list[int]]:
    """Return the token ids of a greedy answer to each prompt, without the stop token. Collective.

    Each forward computes all prompts from their start, padded on the right. It uses no cache: under FSDP the
    cost is gathering the weights, once per token either way. Every rank computes the same. Rank 0's choice
    counts, so that all ranks end together even if their GPUs round differently.

    Args:
        model: the model, sharded or not.
        prompts: token ids of each prompt.
        max_tokens: most tokens of an answer.
        stop_ids: token ids that end an answer.
        rank_info: this process.
        context: context() is entered around every forward.
        images: those of the prompts, in a batch padded on the right to the longest prompt; on the device.
    """
    rows = [list(p) for p in prompts]
    unfinished, features = set(range(len(rows))), None
    with eval_mode(model):
        for _ in range(max_tokens):
            lengths = torch.tensor([len(r) for r in rows])
            ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
            positions, which = (lengths - 1).unique(return_inverse=True)
            inputs = {"input_ids": ids.to(rank_info.device), "logits_to_keep": positions.to(rank_info.device)}
            with context():
                if images is None:
                    logits = model(**inputs, use_cache=False).logits  # [P, positions, V]
                else:  # the first forward makes the features of the images
                    of_images = {"images": images.lengthen(ids.shape[1]), "image_features": features}
                    logits, features = model(**inputs, **of_images)
            chosen = logits[torch.arange(len(rows)), which].argmax(-1)  # [P]
            if rank_info.world > 1:
                dist.broadcast(chosen, 0)
            for i, token in enumerate(chosen.tolist()):
                if i in unfinished:
                    rows[i].append(token)
                    if token in stop_ids:
                        unfinished.discard(i)
            if not unfinished:
                break
    answers = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    return [a[:-1] if a and a[-1] in stop_ids else a for a in answers]
