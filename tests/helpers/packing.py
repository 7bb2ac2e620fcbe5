"""Seven rows, padded and packed, gradients of a model on them, and a reference of attention within rows."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from unittest.mock import patch

import torch

import train
from data.batches import Batch, make_batch
from data.packing import make_packed_batch
from data.rows import TokenizedRows
from models import attention, sinks, varlen
from models.family import unwrapped_name
from parallel.shards import full_tensor
from tests.helpers.image_masks import reference_backward
from tests.helpers.parity import arguments

KERNEL = attention.varlen_attn  # for its signature
LENGTHS = [40, 9, 25, 33, 2, 60, 17]  # beyond the windows of 16 tokens and Phi-3's short tables of 32
PACKS = [[0, 1, 2], [3, 4], [5, 6]]  # 74, 35 and 77 tokens


def seven_rows() -> TokenizedRows:
    """Return rows of LENGTHS random tokens, about 70% of them learned."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor(LENGTHS)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(starts[-1])
    tokens = torch.randint(0, 256, (total,), generator=generator, dtype=torch.int32)
    learned = torch.rand(total, generator=generator) < 0.7
    learned[starts[:-1]] = True  # the first token of a row would be a target of the row before it
    return TokenizedRows(tokens, learned, starts, (), (), torch.arange(1, len(starts)))


def packed_batch() -> Batch:
    """Return the rows packed into 77 tokens, of which 3, 42 and 0 stay free. Two empty rows fill bounds."""
    return make_packed_batch(seven_rows(), [torch.tensor(p) for p in PACKS], (3, 77), max(LENGTHS), 12)


def padded_batch() -> Batch:
    return make_batch(seven_rows(), torch.arange(len(LENGTHS)), (len(LENGTHS), max(LENGTHS)))


def reference_attention(q, k, v, cu_q, cu_k, max_q, max_k, **options):
    """Compute torch's varlen attention [tokens, heads, features] by row. Tokens outside of rows are NaN.

    Asked for it, also returns the logarithms of the sums of exp(score), [heads, tokens].
    """
    if varlen.varlen_takes_window():
        inspect.signature(KERNEL).bind(q, k, v, cu_q, cu_k, max_q, max_k, **options)
    assert torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32 and max_q == max_k
    before, after = options["window_size"]
    assert after == 0
    parts, sums, bounds = [], [], cu_q.tolist()
    for start, end in pairwise(bounds):
        assert end - start <= max_q
        groups = q.shape[1] // k.shape[1]
        one, keys, values = q[start:end], *(t[start:end].repeat_interleave(groups, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", one, keys) * options["scale"]
        position = torch.arange(end - start, device=q.device)
        distance = position[:, None] - position
        hidden = (distance < 0) | ((distance > before) & (before >= 0))
        scores = scores.masked_fill(hidden, -math.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1))
    uncovered = torch.full_like(q[bounds[-1] :], math.nan)
    result = torch.cat([*parts, uncovered])
    return (result, torch.cat([*sums, uncovered[..., 0].T], 1)) if options.get("return_aux") else result


@contextlib.contextmanager
def kernel_by_definition() -> Iterator[None]:
    """Replace the kernel of attention within rows, with and without sinks, by its definition."""
    with (
        patch.object(attention, "varlen_attn", reference_attention),
        patch.object(sinks, "varlen_attn", reference_attention),
        patch.object(sinks, "varlen_backward", reference_backward),
    ):
        yield


def loss_and_gradients(model, batch: Batch, context=nullcontext()) -> tuple[float, dict[str, torch.Tensor]]:  # noqa: B008
    """Return (loss sum, full gradients of the trained tensors in fp32 on the CPU) of a batch."""
    model.zero_grad()
    device = next(p.device for p in model.parameters() if p.requires_grad)  # the embedding may be on the CPU
    with context:
        loss = train.loss_sum(model, batch.to(device))
    loss.backward()
    trained = {unwrapped_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), {name: full_tensor(gradient).float().cpu() for name, gradient in trained.items()}


def packing_arguments(model, data, steps: int) -> list[str]:
    """Return the arguments of a run on 12 rows of 150 to 500 tokens, in 8 packs."""
    more = f"--dataset_samples 12 --context_length 512 --num_epochs 2 --max_steps {steps} --packing true"
    return arguments(model, data, "lora", *more.split())
