"""data/shares.py: the rows of each epoch of a mixture, against rows taken one by one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from data.batches import StepSampler
from data.packing import PackSampler
from data.row_reasons import RowReason
from data.rows import MixedSet, TokenizedRows, digest_rows, join_sets
from data.shares import count_rows_per_epoch, draw_epoch
from options.errors import UserError
from tests.helpers.token_rows import make_token_rows

COUNTS = [  # sizes, weights, rows per epoch
    ((1000, 100), ("0.7", "0.3"), [1000, 429]),  # the smaller set comes four times and a third
    ((1000, 900), ("0.9", "0.1"), [1000, 111]),  # a ninth of the smaller set
    ((1000, 900), ("0.1", "0.9"), [1000, 9000]),
    ((900, 1000), ("0.1", "0.9"), [111, 1000]),
    ((1000, 900), ("9", "1"), [1000, 111]),  # weights need not sum to 1
    ((6, 6), ("7", "3"), [14, 6]),  # of equally large sets none loses rows
    ((10, 4, 1), ("0.5", "0.25", "0.25"), [10, 5, 5]),
    ((1, 1), ("1", "1"), [1, 1]),
    ((5, 3), ("2", "1"), [5, 3]),  # 2.5 is rounded up
]


@pytest.mark.parametrize("sizes, weights, counts", COUNTS)
def test_an_epoch_is_as_long_as_the_larger_set_needs(sizes, weights, counts):
    shares = [Fraction(weight) for weight in weights]
    assert count_rows_per_epoch("abc", sizes, shares) == counts
    for count, size in zip(counts, sizes, strict=True):
        assert size < max(sizes) or count >= size  # no row of a largest set is lost
    for count, share in zip(counts, shares, strict=True):
        assert abs(count / sum(counts) - share / sum(shares)) <= Fraction(2, sum(counts))


def test_shares_that_give_no_row_or_too_many():
    with pytest.raises(UserError, match="the weight of b is too small: an epoch has no row of it"):
        count_rows_per_epoch("ab", (100, 10), [Fraction(1), Fraction(1, 201)])
    with pytest.raises(UserError, match=r"would have 1,000,001,000,000 rows; .* Raise the weight of a"):
        count_rows_per_epoch("ab", (10**6, 10), [Fraction(1, 10**6), Fraction(1)])


def endless(size: int, seed: int, number: int, of: int) -> Iterator[int]:
    """Yield the rows of a set one by one, pass after pass, each shuffled with a seed of its own."""
    turn = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 - 3 - (turn * of + number))
        yield from torch.randperm(size, generator=generator).tolist()
        turn += 1


SETS = [MixedSet("a", 12, 12), MixedSet("b", 5, 8), MixedSet("c", 9, 2)]


def epochs_one_by_one(seed: int, epochs: int) -> list[list[int]]:
    """Return the indices of the rows of each epoch, taken from each set one by one."""
    rows = [endless(each.size, seed, i, len(SETS)) for i, each in enumerate(SETS)]
    starts = [0, 12, 17]
    return [
        [starts[i] + next(rows[i]) for i, each in enumerate(SETS) for _ in range(each.per_epoch)]
        for _ in range(epochs)
    ]


def test_epochs_take_rows_where_the_last_one_stopped():
    expected = epochs_one_by_one(seed=7, epochs=11)
    assert [draw_epoch(SETS, 7, epoch).tolist() for epoch in range(11)] == expected
    for epoch, drawn in enumerate(expected):
        assert sorted(drawn[:12]) == list(range(12))  # the largest set once
        seen = Counter(i for rows in expected[: epoch + 1] for i in rows)
        for part in (range(12, 17), range(17, 26)):  # all rows of a set equally often, or once more
            assert max(seen[i] for i in part) - min(seen[i] for i in part) <= 1
    assert draw_epoch(SETS, 8, 0).tolist() != expected[0]


def mixed_rows() -> TokenizedRows:
    """Return 26 rows in three sets."""
    rows = make_token_rows(26)
    parts = [slice(0, 12), slice(12, 17), slice(17, 26)]
    return join_sets([take(rows, part) for part in parts], SETS)


DROPPED, CUT = (RowReason("empty", 1, (2,)),), (RowReason("long", 2, (3, 4)),)


def take(rows: TokenizedRows, part: slice) -> TokenizedRows:
    starts = rows.starts[part.start : part.stop + 1]
    tokens = slice(int(starts[0]), int(starts[-1]))
    numbers = torch.arange(1, len(starts))
    return TokenizedRows(rows.tokens[tokens], rows.learned[tokens], starts - starts[0], DROPPED, CUT, numbers)


def make(rows: TokenizedRows, packing: bool, *sizes: int) -> StepSampler:
    return PackSampler(rows, *sizes, 42, 29) if packing else StepSampler(rows, *sizes, 42)


def dealt(sampler: StepSampler, epochs: int) -> list[list[int]]:
    """Return the rows of each step."""
    return [step.rows.tolist() for step in sampler.steps(epochs)]


def test_joined_sets_are_the_rows_one_after_the_other():
    rows, plain = mixed_rows(), make_token_rows(26)
    for name in ("tokens", "learned", "starts"):
        assert torch.equal(getattr(rows, name), getattr(plain, name))
    assert (rows.dropped, rows.cut) == (3, 6)
    assert rows.describe_reasons()[4] == "2 rows cut: long, in b (rows 3, 4)"
    assert [rows.row_name(i) for i in (0, 11, 12, 16, 25)] == [
        "1 of a",
        "12 of a",
        "1 of b",
        "5 of b",
        "9 of c",
    ]


def test_steps_deal_the_rows_of_the_mixture():
    """In an order that is that of an epoch of the same rows, and the same however it is split."""
    rows, expected = mixed_rows(), epochs_one_by_one(42, 3)
    for epoch, drawn in enumerate(expected):
        generator = torch.Generator().manual_seed(42 * 1_000_003 + epoch)
        expected[epoch] = [drawn[i] for i in torch.randperm(22, generator=generator).tolist()]
    for batch_size, accumulation, world in ((4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)):
        sampler = make(rows, False, batch_size, accumulation, 0, world)
        steps = dealt(sampler, 3)
        assert sampler.rows_per_epoch() == 22 and sampler.steps_per_epoch() == 6
        assert [i for step in steps for i in step] == [i for epoch in expected for i in epoch]
        assert [len(step) for step in steps] == [4, 4, 4, 4, 4, 2] * 3


def test_packs_have_the_rows_of_the_first_epoch():
    rows = mixed_rows()
    samplers = [make(rows, True, 2, 1, 0, 1), make(rows, True, 1, 1, 1, 2)]
    steps = [dealt(sampler, 3) for sampler in samplers]
    assert steps[0] == steps[1]  # on two ranks
    count, drawn = samplers[0].steps_per_epoch(), sorted(epochs_one_by_one(42, 1)[0])
    epochs = [steps[0][i : i + count] for i in range(0, 3 * count, count)]
    for epoch in epochs:
        assert sorted(i for step in epoch for i in step) == drawn
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_goes_on_in_the_middle_of_an_epoch(packing):
    sampler = make(mixed_rows(), packing, 2, 1, 0, 1)
    steps, per_epoch = dealt(sampler, 3), sampler.steps_per_epoch()
    for done in (1, per_epoch, per_epoch + 2, 3 * per_epoch - 1):
        assert [step.rows.tolist() for step in sampler.steps(3, done)] == steps[done:]


def test_padding_counts_the_rows_of_an_epoch():
    sampler = make(mixed_rows(), False, 2, 1, 0, 1)
    batches = [step.batches[0] for step in sampler.steps(1)]
    empty, places = (sum(f(b.ids) for b in batches) for f in (lambda ids: int((ids == 0).sum()), torch.numel))
    assert sampler.padding_share() == pytest.approx(empty / places, abs=1e-12)


def test_other_shares_are_another_run():
    """The digest tells --resume and other nodes; that of a single set is as before."""
    rows, plain = mixed_rows(), make_token_rows(26)
    other = dataclasses.replace(rows, sets=(SETS[0], MixedSet("b", 5, 9), SETS[2]))
    renamed = dataclasses.replace(rows, sets=(MixedSet("x", 12, 12), *SETS[1:]))
    assert digest_rows(rows) == digest_rows(renamed)  # a path may differ
    assert len({digest_rows(each) for each in (rows, other, plain)}) == 3
