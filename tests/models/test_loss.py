"""The loss without logits is F.cross_entropy of the logits, in chunks of any size, whole or by parts of the
vocabulary; so are its gradients. fp32, on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from data.batches import learned_positions
from data.packing import make_sampler
from data.rows import IGNORE
from models import loss
from models.loss import FrozenEmbedding, Head, look_up, shard_vocabulary
from tests.helpers.parity import arguments
from tests.helpers.runs import set_up
from wrapping import make_mesh

HIDDEN, VOCABULARY, TOKENS = 16, 301, 23  # 301: two ranks get 151 and 150 rows, four 76, 76, 76, 73


def case(seed: int, dtype=torch.float32, vocabulary: int = VOCABULARY):
    """(hidden states [1, T, H], a head's weight, targets [1, T], of which some are not learned: more with a larger
    seed)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, HIDDEN, generator=torch.Generator().manual_seed(99))
    targets = torch.randint(0, vocabulary, (1, TOKENS), generator=generator)
    ignored = torch.rand(1, TOKENS, generator=generator) < 0.4 + seed / 10
    return x, weight.to(dtype), targets.masked_fill(ignored, IGNORE)


def reference(x, weight, targets, softcap):
    """(loss, gradients of x and of the weight), from all logits."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = x @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total.detach(), *torch.autograd.grad(total * 0.37, (x, weight))


def head_of(weight: torch.Tensor, trained: bool) -> Head:
    with torch.device("meta"):
        head = Head(HIDDEN, VOCABULARY, bias=False)
    head.weight = nn.Parameter(weight, requires_grad=trained)
    return head


def assert_equal(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_rows_that_are_not_here_are_zeros():
    rows, index = torch.randn(5, 3), torch.tensor([4, 0, 2, 4])
    here = torch.tensor([True, False, True, False])
    assert torch.equal(look_up(rows, index), rows[index])
    assert torch.equal(look_up(rows, index, here), rows[index] * here[:, None])
    assert torch.equal(look_up(rows[:0], index, here), torch.zeros(4, 3))


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Within, the tokens of each chunk that a head computes are added to the list."""
    statistics, *kernels = loss.KERNELS[False]
    computed = []

    def counted(z, *args):
        computed.append(len(z))
        return statistics(z, *args)

    with mock.patch.dict(loss.KERNELS, {False: (counted, *kernels)}):
        yield computed


def target_positions_of(targets: torch.Tensor, others: int | None) -> torch.Tensor | None:
    """Of the learned tokens and `others`; or None, for all tokens."""
    return None if others is None else learned_positions(targets, int((targets != IGNORE).sum()) + others)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("others", [None, 0, 3])
@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_loss_and_gradients(rows, others, softcap, monkeypatch):
    """In chunks of one token, of seven, and of all; from all tokens, the learned ones, and three more."""
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * rows * VOCABULARY * 4)
    x, weight, targets = case(0)
    head, leaf = head_of(weight, trained=True), x.clone().requires_grad_()
    head.softcap, target_positions = softcap, target_positions_of(targets, others)
    with counting() as computed:
        total = head(leaf, targets, target_positions)
    assert sum(computed) == (TOKENS if target_positions is None else len(target_positions))
    got = total.detach(), *torch.autograd.grad(total * 0.37, (leaf, head.weight))
    assert_equal(got, reference(x, weight, targets, softcap))
    with torch.no_grad():
        torch.testing.assert_close(head(x, targets, target_positions), got[0])


def test_compiled():
    """By Inductor, whose kernels a C++ compiler has to build; in whole runs that is left out."""
    x, weight, targets = case(0)
    head, leaf = head_of(weight, trained=True), x.clone().requires_grad_()
    head.compiled = True
    total = head(leaf, targets, target_positions_of(targets, 3))
    assert_equal(
        (total.detach(), *torch.autograd.grad(total * 0.37, (leaf, head.weight))),
        reference(x, weight, targets, None),
    )


def rows_of_the_head(place, argv: list) -> tuple[int, int, int]:
    """(tokens that the head computes of a run's first micro-batch, places of that, its tokens)."""
    job, model = set_up(place, argv)
    step = next(make_sampler(job.config, job.rows, place.rank, place.world).steps(1))
    batch = step.batches[0].to(place.device)
    with counting() as computed, torch.no_grad():
        train.loss_sum(model, batch)
    return sum(computed), len(batch.target_positions), batch.targets.numel()


def test_a_run_computes_no_logits_of_prompts(checkpoints, alpaca_file, one_rank):
    args = arguments(checkpoints(), alpaca_file, "lora")
    computed, learned, tokens = one_rank(rows_of_the_head, args)[0]
    assert computed == learned < 0.9 * tokens


def test_nothing_learned_is_nothing_lost():
    x, weight, targets = case(0)
    leaf = x.requires_grad_()
    total = head_of(weight, trained=False)(leaf, torch.full_like(targets, IGNORE))
    total.backward()
    assert total == 0 and not leaf.grad.any()


def sharded(place, weight: torch.Tensor) -> tuple[Head, nn.Embedding]:
    """A head and an embedding tied to it, of which this rank has its rows of the weight."""
    with torch.device("meta"):
        embedding = nn.Embedding(*weight.shape)
        head = Head(HIDDEN, len(weight), bias=False)
    head.weight = embedding.weight
    embedding.weight.requires_grad_(False)
    shard_vocabulary([embedding, head], make_mesh(place.device.type, place.world, "full_shard", place.world))
    assert isinstance(embedding, FrozenEmbedding) and embedding.weight is head.weight
    most = -(-len(weight) // place.world)
    local = torch.empty_like(head.weight.to_local(), device=place.device, dtype=weight.dtype)
    local.copy_(weight[most * place.rank : most * (place.rank + 1)])
    sharded = type(head.weight.data).from_local(
        local, head.weight.device_mesh, head.weight.placements, shape=weight.shape, stride=weight.stride()
    )
    head.weight = embedding.weight = nn.Parameter(sharded, requires_grad=False)
    return head, embedding


def parts(place, softcap, vocabulary: int = VOCABULARY, chosen: bool = False):
    """(loss, gradient of x, logits, embedded tokens) of this rank's tokens, by its part of the vocabulary.
    chosen: from as many tokens as are learned on the rank with most, else from all."""
    x, weight, targets = (t.to(place.device) for t in case(place.rank, vocabulary=vocabulary))
    head, embedding = sharded(place, weight)
    head.softcap, leaf = softcap, x.clone().requires_grad_()
    learned = [int((case(rank)[2] != IGNORE).sum()) for rank in range(place.world)]
    assert len(set(learned)) > 1
    target_positions = learned_positions(targets, max(learned)) if chosen else None
    with (
        mock.patch.object(loss, "LOGITS_BYTES", 4 * 9 * 151 * 4),
        mock.patch.object(loss, "HIDDEN_BYTES", 4 * HIDDEN * 20),
    ):
        total = head(leaf, targets, target_positions)
        embedded = embedding(targets.clamp_min(0))
    (total * 0.37).backward()
    results = total.detach(), leaf.grad, head(x), embedded
    return tuple(r.cpu() for r in results)


def assert_parts_equal(results, softcap, vocabulary: int) -> None:
    for rank, (total, gradient, logits, embedded) in enumerate(results):
        x, weight, targets = case(rank, vocabulary=vocabulary)
        assert_equal((total, gradient), reference(x, weight, targets, softcap)[:2])
        torch.testing.assert_close(logits, x @ weight.T, rtol=2e-5, atol=2e-5)
        assert torch.equal(embedded, weight[targets.clamp_min(0)])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_by_parts_of_the_vocabulary(ranks, chosen, softcap, request):
    results = request.getfixturevalue(ranks)(parts, softcap, VOCABULARY, chosen)
    assert_parts_equal(results, softcap, VOCABULARY)


@pytest.mark.parametrize(("vocabulary", "rows"), [(5, [2, 2, 1, 0]), (2, [1, 1, 0, 0])])
def test_ranks_without_rows(vocabulary, rows, four_ranks):
    assert four_ranks(held_rows, vocabulary) == rows
    assert_parts_equal(four_ranks(parts, 3.0, vocabulary), 3.0, vocabulary)


def held_rows(place, vocabulary: int) -> int:
    return len(sharded(place, case(0, vocabulary=vocabulary)[1])[0].weight.to_local())


def exchanged(place, tokens: int, hidden_bytes: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Of every collective of a loss and a lookup of bf16, its kind, and the dtype and shape for all ranks."""
    head, embedding = sharded(place, case(0)[1].bfloat16().to(place.device))
    x = torch.ones(1, tokens, HIDDEN, dtype=torch.bfloat16, device=place.device, requires_grad=True)
    targets, seen = torch.ones(1, tokens, dtype=torch.int64, device=place.device), []
    gather, scatter = loss.all_gather, loss.reduce_scatter

    def all_gather(out, given, **kwargs):
        seen.append(("gather", out.dtype, tuple(out.shape)))
        gather(out, given, **kwargs)

    def reduce_scatter(out, given, **kwargs):
        seen.append(("sum", given.dtype, tuple(given.shape)))
        scatter(out, given, **kwargs)

    with (
        mock.patch.object(loss, "all_gather", all_gather),
        mock.patch.object(loss, "reduce_scatter", reduce_scatter),
        mock.patch.object(loss, "HIDDEN_BYTES", hidden_bytes),
    ):
        head(x, targets).backward()
        embedding(targets)
    return seen


def test_what_is_exchanged_does_not_grow_with_the_ranks(two_ranks, four_ranks):
    """Blocks of hidden states, the same on every rank; 16-bit gradients are summed in fp32."""
    at_once, most = 4 * HIDDEN * 8, {}
    for world, ranks in ((2, two_ranks), (4, four_ranks)):
        seen = ranks(exchanged, TOKENS, at_once)
        assert all(other == seen[0] for other in seen)
        states = [(kind, dtype, shape) for kind, dtype, shape in seen[0] if shape[-1] == HIDDEN]
        most[world] = max(shape[0] for _, _, shape in states)
        of_head = [(kind, dtype) for kind, dtype, _ in states][: 2 * -(-TOKENS // (8 // world))]
        assert set(of_head) == {("gather", torch.bfloat16), ("sum", torch.float32)}
        for kind in ("gather", "sum"):  # all tokens of all ranks, once
            rows = [shape[0] for k, _, shape in states[: len(of_head)] if k == kind]
            assert sum(rows) == world * TOKENS
    assert most == {2: 8, 4: 8}


def test_fp16_gradients_do_not_underflow():
    """The loss's own gradient is formed before GradScaler's factor is known: for a sum, whose terms are near 1."""
    x, weight, targets = case(0, torch.float16)
    leaf = x.clone().requires_grad_()
    total = head_of(weight, trained=False)(leaf, targets)
    (total * 1e-3 * 65536).backward()
    expected = reference(x.float(), weight.float(), targets, None)[1] / 0.37 * 1e-3 * 65536
    torch.testing.assert_close(leaf.grad.float(), expected, rtol=2e-2, atol=2e-1)


def test_fp16_keeps_what_is_below_its_smallest_number():
    """Where a token is all but known, its gradients by the logits are below 6e-8, and still there once they are scaled.
    So are those by the weight."""
    dtype, generator = torch.float16, torch.Generator().manual_seed(0)
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.01 - 1).to(dtype)
    weight[0] = 0
    x = torch.full((1, 256, HIDDEN), 1.125, dtype=dtype)  # the first logit is 0, the others are around -18
    targets = torch.zeros(1, 256, dtype=torch.int64)
    head, leaf = head_of(weight.clone(), trained=True), x.clone().requires_grad_()
    (head(leaf, targets) * 65536).backward()
    _, of_x, of_weight = reference(x.double(), weight.double(), targets, None)
    assert of_weight[1:].abs().max() / 0.37 / 256 < 6e-8
    for got, expected in ((leaf.grad, of_x), (head.weight.grad, of_weight)):
        torch.testing.assert_close(got.double(), expected / 0.37 * 65536, rtol=5e-2, atol=1e-5)


def test_fp16_gradients_do_not_overflow():
    """By the factor that keeps the small ones: the worst token, and a head's largest weights."""
    weight = torch.full((VOCABULARY, HIDDEN), 100.0)
    weight[0] = -100.0
    x, targets = torch.ones(1, TOKENS, HIDDEN), torch.zeros(1, TOKENS, dtype=torch.int64)
    leaf = (x * 0.1).half().requires_grad_()
    head_of(weight.half(), trained=False)(leaf, targets).backward()
    torch.testing.assert_close(leaf.grad, torch.full_like(leaf, 200.0))
