"""The loss without full logits, and its gradients, against F.cross_entropy of the logits.

In chunks of any size, with a full or a sharded vocabulary. In fp32, on the CPU.
"""

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
from models.loss import FrozenEmbedding, Head, look_up_rows, shard_vocabulary
from tests.helpers.parity import arguments
from tests.helpers.runs import set_up
from wrapping import make_mesh

HIDDEN, VOCABULARY, TOKENS = 16, 301, 23  # 301: two ranks get 151 and 150 rows, four 76, 76, 76, 73


def make_case(seed: int, dtype=torch.float32, vocabulary: int = VOCABULARY):
    """Return (hidden states [1, T, H], a head's weight, targets [1, T]).

    Some targets are IGNORE; more with a larger seed.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, HIDDEN, generator=torch.Generator().manual_seed(99))
    targets = torch.randint(0, vocabulary, (1, TOKENS), generator=generator)
    ignored = torch.rand(1, TOKENS, generator=generator) < 0.4 + seed / 10
    return x, weight.to(dtype), targets.masked_fill(ignored, IGNORE)


def make_bias(vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(98))


def reference(x, weight, targets, softcap, bias=None, scale: float = 1.0):
    """Return (loss, gradients of x, of the weight and of the bias, if there is one), from all logits."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    logits = scale * F.linear(*leaves)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total.detach(), *torch.autograd.grad(total * 0.37, leaves)


def make_head(weight: torch.Tensor, trained: bool) -> Head:
    with torch.device("meta"):
        head = Head(HIDDEN, VOCABULARY, bias=False)
    head.weight = nn.Parameter(weight, requires_grad=trained)
    return head


def assert_equal(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_rows_outside_of_the_mask_are_zeros():
    rows, index = torch.randn(5, 3), torch.tensor([4, 0, 2, 4])
    mask = torch.tensor([True, False, True, False])
    assert torch.equal(look_up_rows(rows, index), rows[index])
    assert torch.equal(look_up_rows(rows, index, mask), rows[index] * mask[:, None])
    assert torch.equal(look_up_rows(rows[:0], index, mask), torch.zeros(4, 3))


@contextlib.contextmanager
def counted_tokens() -> Iterator[list[int]]:
    """Within this context, append the tokens of each chunk that a head computes to the yielded list."""
    statistics, *kernels = loss.KERNELS[False]
    computed = []

    def counted(z, *args):
        computed.append(len(z))
        return statistics(z, *args)

    with mock.patch.dict(loss.KERNELS, {False: (counted, *kernels)}):
        yield computed


def target_positions_of(targets: torch.Tensor, others: int | None) -> torch.Tensor | None:
    """Return the positions of the learned tokens and of `others` more; without `others` None, for all."""
    return None if others is None else learned_positions(targets, int((targets != IGNORE).sum()) + others)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("others", [None, 0, 3])
@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_loss_and_gradients(rows, others, softcap, monkeypatch):
    """In chunks of 1, 7 and all tokens; from all tokens, the learned ones, and three more."""
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * rows * VOCABULARY * 4)
    x, weight, targets = make_case(0)
    head, leaf = make_head(weight, trained=True), x.clone().requires_grad_()
    head.softcap, target_positions = softcap, target_positions_of(targets, others)
    with counted_tokens() as computed:
        total = head(leaf, targets, target_positions)
    assert sum(computed) == (TOKENS if target_positions is None else len(target_positions))
    got = total.detach(), *torch.autograd.grad(total * 0.37, (leaf, head.weight))
    assert_equal(got, reference(x, weight, targets, softcap))
    with torch.no_grad():
        torch.testing.assert_close(head(x, targets, target_positions), got[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bias(dtype, monkeypatch):
    """A trained bias in chunks of 7 tokens, with a scale and a cap. In fp16 its gradients are scaled."""
    monkeypatch.setattr(loss, "LOGITS_BYTES", dtype.itemsize * 7 * VOCABULARY * 4)
    x, weight, targets = make_case(0, dtype)
    head, leaf = make_head(weight, trained=True), x.clone().requires_grad_()
    head.bias, head.scale, head.softcap = nn.Parameter(make_bias().to(dtype)), 0.5, 3.0
    total = head(leaf, targets)
    got = total.detach(), *torch.autograd.grad(total * 0.37, (leaf, head.weight, head.bias))
    wide = x.float(), weight.float(), targets, 3.0, head.bias.detach().float(), 0.5
    for ours, expected in zip(got, reference(*wide), strict=True):
        tolerance = 2e-5 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance)


def test_compiled():
    """By Inductor, whose kernels need a C++ compiler. Tests of runs use another backend."""
    x, weight, targets = make_case(0)
    head, leaf = make_head(weight, trained=True), x.clone().requires_grad_()
    head.compiled = True
    total = head(leaf, targets, target_positions_of(targets, 3))
    got = total.detach(), *torch.autograd.grad(total * 0.37, (leaf, head.weight))
    assert_equal(got, reference(x, weight, targets, None))


def count_head_tokens(rank_info, argv: list) -> tuple[int, int, int]:
    """Return (tokens that the head computes, target positions, tokens) of a run's first micro-batch."""
    job, model = set_up(rank_info, argv)
    step = next(make_sampler(job.config, job.rows, rank_info.rank, rank_info.world).steps(1))
    batch = step.batches[0].to(rank_info.device)
    with counted_tokens() as computed, torch.no_grad():
        train.loss_sum(model, batch)
    return sum(computed), len(batch.target_positions), batch.targets.numel()


def test_a_run_computes_no_logits_of_prompts(checkpoints, alpaca_file, one_rank):
    args = arguments(checkpoints(), alpaca_file, "lora")
    computed, learned, tokens = one_rank(count_head_tokens, args)[0]
    assert computed == learned < 0.9 * tokens


def test_no_learned_token_gives_zero_loss():
    x, weight, targets = make_case(0)
    leaf = x.requires_grad_()
    total = make_head(weight, trained=False)(leaf, torch.full_like(targets, IGNORE))
    total.backward()
    assert total == 0 and not leaf.grad.any()


def make_sharded(rank_info, weight: torch.Tensor) -> tuple[Head, nn.Embedding]:
    """Make a head and an embedding tied to it, with this rank's rows of the weight."""
    with torch.device("meta"):
        embedding = nn.Embedding(*weight.shape)
        head = Head(HIDDEN, len(weight), bias=False)
    head.weight = embedding.weight
    embedding.weight.requires_grad_(False)
    shard_vocabulary(
        [embedding, head], make_mesh(rank_info.device.type, rank_info.world, "full_shard", rank_info.world)
    )
    assert isinstance(embedding, FrozenEmbedding) and embedding.weight is head.weight
    max_rows = -(-len(weight) // rank_info.world)
    local = torch.empty_like(head.weight.to_local(), device=rank_info.device, dtype=weight.dtype)
    local.copy_(weight[max_rows * rank_info.rank : max_rows * (rank_info.rank + 1)])
    sharded = type(head.weight.data).from_local(
        local, head.weight.device_mesh, head.weight.placements, shape=weight.shape, stride=weight.stride()
    )
    head.weight = embedding.weight = nn.Parameter(sharded, requires_grad=False)
    return head, embedding


def sharded_results(
    rank_info,
    softcap,
    vocabulary: int = VOCABULARY,
    learned_only: bool = False,
    bias: torch.Tensor | None = None,
):
    """Return (loss, gradient of x, logits, embedded tokens) of this rank's tokens, with a sharded vocabulary.

    learned_only: compute only as many tokens as the rank with most learned ones has, else all.
    bias: the head's; each rank has all of it.
    """
    x, weight, targets = (t.to(rank_info.device) for t in make_case(rank_info.rank, vocabulary=vocabulary))
    head, embedding = make_sharded(rank_info, weight)
    head.softcap, leaf = softcap, x.clone().requires_grad_()
    if bias is not None:
        head.bias = nn.Parameter(bias.to(rank_info.device), requires_grad=False)
    learned = [int((make_case(rank)[2] != IGNORE).sum()) for rank in range(rank_info.world)]
    assert len(set(learned)) > 1
    target_positions = learned_positions(targets, max(learned)) if learned_only else None
    with (
        mock.patch.object(loss, "LOGITS_BYTES", 4 * 9 * 151 * 4),
        mock.patch.object(loss, "HIDDEN_BYTES", 4 * HIDDEN * 20),
    ):
        total = head(leaf, targets, target_positions)
        embedded = embedding(targets.clamp_min(0))
    (total * 0.37).backward()
    results = total.detach(), leaf.grad, head(x), embedded
    return tuple(r.cpu() for r in results)


def assert_sharded_equal(results, softcap, vocabulary: int, bias: torch.Tensor | None = None) -> None:
    """Compare each rank's `sharded_results` with a full vocabulary."""
    for rank, (total, gradient, logits, embedded) in enumerate(results):
        x, weight, targets = make_case(rank, vocabulary=vocabulary)
        assert_equal((total, gradient), reference(x, weight, targets, softcap, bias)[:2])
        torch.testing.assert_close(logits, F.linear(x, weight, bias), rtol=2e-5, atol=2e-5)
        assert torch.equal(embedded, weight[targets.clamp_min(0)])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("learned_only", [False, True])
@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_sharded_vocabulary(ranks, learned_only, softcap, request):
    results = request.getfixturevalue(ranks)(sharded_results, softcap, VOCABULARY, learned_only)
    assert_sharded_equal(results, softcap, VOCABULARY)


@pytest.mark.parametrize(("vocabulary", "rows"), [(5, [2, 2, 1, 0]), (2, [1, 1, 0, 0])])
def test_ranks_without_rows(vocabulary, rows, four_ranks):
    assert four_ranks(count_local_rows, vocabulary) == rows
    bias = make_bias(vocabulary)
    results = four_ranks(sharded_results, 3.0, vocabulary, False, bias)
    assert_sharded_equal(results, 3.0, vocabulary, bias)


def count_local_rows(rank_info, vocabulary: int) -> int:
    return len(make_sharded(rank_info, make_case(0, vocabulary=vocabulary)[1])[0].weight.to_local())


def record_collectives(
    rank_info, tokens: int, hidden_bytes: int
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Return (kind, dtype, shape for all ranks) of each collective of a loss and a lookup in bf16."""
    head, embedding = make_sharded(rank_info, make_case(0)[1].bfloat16().to(rank_info.device))
    x = torch.ones(1, tokens, HIDDEN, dtype=torch.bfloat16, device=rank_info.device, requires_grad=True)
    targets, seen = torch.ones(1, tokens, dtype=torch.int64, device=rank_info.device), []
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


def test_collectives_do_not_grow_with_the_ranks(two_ranks, four_ranks):
    """Chunks of hidden states are equal on all ranks; 16-bit gradients are summed in fp32."""
    hidden_bytes, most = 4 * HIDDEN * 8, {}
    for world, ranks in ((2, two_ranks), (4, four_ranks)):
        seen = ranks(record_collectives, TOKENS, hidden_bytes)
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
    """The loss forms its gradient before GradScaler's factor is known: for a sum, whose terms are near 1."""
    x, weight, targets = make_case(0, torch.float16)
    leaf = x.clone().requires_grad_()
    total = make_head(weight, trained=False)(leaf, targets)
    (total * 1e-3 * 65536).backward()
    expected = reference(x.float(), weight.float(), targets, None)[1] / 0.37 * 1e-3 * 65536
    torch.testing.assert_close(leaf.grad.float(), expected, rtol=2e-2, atol=2e-1)


def test_fp16_keeps_gradients_below_its_smallest_number():
    """A token with a loss near 0 has gradients below 6e-8, of logits and weight; scaling must keep them."""
    dtype, generator = torch.float16, torch.Generator().manual_seed(0)
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.01 - 1).to(dtype)
    weight[0] = 0
    x = torch.full((1, 256, HIDDEN), 1.125, dtype=dtype)  # the first logit is 0, the others are around -18
    targets = torch.zeros(1, 256, dtype=torch.int64)
    head, leaf = make_head(weight.clone(), trained=True), x.clone().requires_grad_()
    (head(leaf, targets) * 65536).backward()
    _, grad_x, grad_weight = reference(x.double(), weight.double(), targets, None)
    assert grad_weight[1:].abs().max() / 0.37 / 256 < 6e-8
    for got, expected in ((leaf.grad, grad_x), (head.weight.grad, grad_weight)):
        torch.testing.assert_close(got.double(), expected / 0.37 * 65536, rtol=5e-2, atol=1e-5)


def test_fp16_gradients_do_not_overflow():
    """The factor for small gradients must fit the worst token and the largest weights of a head."""
    weight = torch.full((VOCABULARY, HIDDEN), 100.0)
    weight[0] = -100.0
    x, targets = torch.ones(1, TOKENS, HIDDEN), torch.zeros(1, TOKENS, dtype=torch.int64)
    leaf = (x * 0.1).half().requires_grad_()
    make_head(weight.half(), trained=False)(leaf, targets).backward()
    torch.testing.assert_close(leaf.grad, torch.full_like(leaf, 200.0))
