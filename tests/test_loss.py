"""The loss without logits is F.cross_entropy of the logits, in chunks of any size, whole or by parts of the
vocabulary; so are its gradients. fp32, on the CPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loss
from data import IGNORE
from loss import Head, ShardedEmbedding, shard_vocabulary
from wrapping import make_mesh

HIDDEN, VOCABULARY, TOKENS = 16, 301, 23  # 301: two ranks get 151 and 150 rows, four 76, 76, 76, 73


def case(seed: int, dtype=torch.float32):
    """(hidden states [1, T, H], a head's weight, targets [1, T], of which some are not learned)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(99))
    targets = torch.randint(0, VOCABULARY, (1, TOKENS), generator=generator)
    return x, weight.to(dtype), targets.masked_fill(torch.rand(1, TOKENS, generator=generator) < 0.4, IGNORE)


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


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_loss_and_gradients(rows, softcap, monkeypatch):
    """In chunks of one token, of seven, and of all."""
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * rows * VOCABULARY * 4)
    x, weight, targets = case(0)
    head, leaf = head_of(weight, trained=True), x.clone().requires_grad_()
    total = head(leaf, targets, softcap)
    got = total.detach(), *torch.autograd.grad(total * 0.37, (leaf, head.weight))
    assert_equal(got, reference(x, weight, targets, softcap))
    with torch.no_grad():
        torch.testing.assert_close(head(x, targets, softcap), got[0])


def test_nothing_learned_is_nothing_lost():
    x, weight, targets = case(0)
    leaf = x.requires_grad_()
    total = head_of(weight, trained=False)(leaf, torch.full_like(targets, IGNORE))
    total.backward()
    assert total == 0 and not leaf.grad.any()


def parts(place, softcap):
    """(loss, gradient of x, logits, embedded tokens) of this rank's tokens, by its part of the vocabulary."""
    x, weight, targets = (t.to(place.device) for t in case(place.rank))
    with torch.device("meta"):
        embedding = nn.Embedding(VOCABULARY, HIDDEN)
        head = Head(HIDDEN, VOCABULARY, bias=False)
    head.weight = embedding.weight  # tied
    embedding.weight.requires_grad_(False)
    shard_vocabulary([embedding, head], make_mesh(place.device.type, place.world, "full_shard", place.world))
    assert isinstance(embedding, ShardedEmbedding) and embedding.weight is head.weight
    chunks = weight.chunk(place.world)
    local = torch.empty_like(head.weight.to_local(), device=place.device).copy_(chunks[place.rank])
    sharded = type(head.weight.data).from_local(
        local, head.weight.device_mesh, head.weight.placements, shape=weight.shape, stride=weight.stride()
    )
    head.weight = embedding.weight = nn.Parameter(sharded, requires_grad=False)
    leaf = x.clone().requires_grad_()
    with mock.patch.object(loss, "LOGITS_BYTES", 4 * 9 * 151 * 4):
        total = head(leaf, targets, softcap)
    (total * 0.37).backward()
    results = total.detach(), leaf.grad, head(x), embedding(targets.clamp_min(0))
    return tuple(r.cpu() for r in results)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_by_parts_of_the_vocabulary(ranks, softcap, request):
    for rank, (total, gradient, logits, embedded) in enumerate(
        request.getfixturevalue(ranks)(parts, softcap)
    ):
        x, weight, targets = case(rank)
        assert_equal((total, gradient), reference(x, weight, targets, softcap)[:2])
        torch.testing.assert_close(logits, x @ weight.T, rtol=2e-5, atol=2e-5)
        assert torch.equal(embedded, weight[targets.clamp_min(0)])


def test_fp16_gradients_do_not_underflow():
    """The loss's own gradient is formed before GradScaler's factor is known: for a sum, whose terms are near 1."""
    x, weight, targets = case(0, torch.float16)
    leaf = x.clone().requires_grad_()
    total = head_of(weight, trained=False)(leaf, targets)
    (total * 1e-3 * 65536).backward()
    expected = reference(x.float(), weight.float(), targets, None)[1] / 0.37 * 1e-3 * 65536
    torch.testing.assert_close(leaf.grad.float(), expected, rtol=2e-2, atol=2e-1)
