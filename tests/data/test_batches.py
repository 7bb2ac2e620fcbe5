"""data/batches.py: how rows are dealt to steps, ranks and micro-batches, and padded."""

from __future__ import annotations

import itertools

import pytest
import torch

from data.batches import StepSampler, round_length
from data.rows import IGNORE, TokenizedRows
from tests.helpers.token_rows import SIZES, assert_target_positions, expected, make_token_rows


def unpadded(batch) -> dict[tuple, tuple]:
    """Return {tokens: targets} of a batch's rows, which may be padded on the right only."""
    table = {}
    lengths = (batch.ids != 0).sum(1).tolist()
    assert batch.ids.shape == batch.targets.shape
    for ids, targets, length in zip(batch.ids.tolist(), batch.targets.tolist(), lengths, strict=True):
        assert ids[length:] == [0] * (len(ids) - length)
        assert targets[length:] == [IGNORE] * (len(ids) - length)
        if length:
            table[tuple(ids[:length])] = tuple(targets[:length])
    return table


def deal_steps(rows, batch_size, accumulation, world, seed=42, epochs=1):
    """Return [[the step of each rank] for each step]."""
    samplers = [StepSampler(rows, batch_size, accumulation, r, world, seed) for r in range(world)]
    steps = list(zip(*(s.steps(epochs) for s in samplers), strict=True))
    assert len(steps) == epochs * samplers[0].steps_per_epoch()
    return steps


def collect_rows(step) -> dict[tuple, tuple]:
    """Return {tokens: targets} of all ranks' rows in a step, each once, but of batches without targets."""
    batches = [b for part in step for b in part.batches if (b.targets != IGNORE).any()]
    tables = [unpadded(b) for b in batches]
    merged = {ids: targets for table in tables for ids, targets in table.items()}
    assert len(merged) == sum(map(len, tables))
    return merged


@pytest.mark.parametrize("size", SIZES)
def test_an_epoch_has_every_row_once_with_its_targets(size):
    rows = make_token_rows(size[0])
    steps = deal_steps(rows, *size[1:])
    tables = [collect_rows(step) for step in steps]
    assert sum(map(len, tables)) == size[0]
    assert {ids: targets for table in tables for ids, targets in table.items()} == expected(rows)
    for step, table in zip(steps, tables, strict=True):
        tokens = sum(map(len, table))
        targets = sum(t != IGNORE for values in table.values() for t in values)
        assert {(part.n_tokens, part.n_targets) for part in step} == {(tokens, targets)}
        for batches in zip(*(part.batches for part in step), strict=True):  # the parts of a micro-batch
            (shape,) = {b.ids.shape for b in batches}  # collectives need all ranks alike
            longest = max(len(ids) for b in batches for ids in unpadded(b))
            assert shape == (max(len(unpadded(b)) for b in batches), longest)
        assert all(len(b.ids) <= size[1] for part in step for b in part.batches)


def test_lines_of_many_lengths_have_few_widths():
    """No line is shorter than its rows, more than 1/16 longer, or longer than the longest row."""
    rounded = [round_length(n) for n in (1, 31, 32, 33, 135, 136, 137, 2047, 2049)]
    assert rounded == [1, 31, 32, 34, 136, 136, 144, 2048, 2176]
    lengths = range(100, 2000, 7)
    rows = TokenizedRows(
        torch.arange(1, sum(lengths) + 1, dtype=torch.int32),
        torch.ones(sum(lengths), dtype=torch.bool),
        torch.tensor([0, *itertools.accumulate(lengths)]),
        *((), ()),
        torch.arange(1, len(lengths) + 1),
    )
    widths = [step[0].batches[0].ids.shape[1] for step in deal_steps(rows, 1, 1, 1)]
    assert len(lengths) == len(widths) == 272 and len(set(widths)) <= 72
    for width, length in zip(sorted(widths), lengths, strict=True):
        assert length <= width <= min(length * 17 / 16, lengths[-1])


@pytest.mark.parametrize("count", [5, 16, 21])
def test_a_step_has_the_same_rows_however_it_is_split(count):
    rows = make_token_rows(count)
    splits = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2), (1, 2, 4)]
    runs = [deal_steps(rows, *split, epochs=2) for split in splits]
    for step in itertools.chain(*runs):
        assert_target_positions(step)
    runs = [[collect_rows(step) for step in steps] for steps in runs]
    assert all(other == runs[0] for other in runs[1:])


def test_a_rank_without_rows_gets_a_batch_without_targets():
    (step,) = deal_steps(make_token_rows(3), 2, 1, 3)
    idle = step[2].batches[0]
    assert (idle.targets == IGNORE).all()
    assert idle.ids.numel() > 0
    assert_target_positions(step)
    assert step[2].n_targets == step[0].n_targets > 0


def test_the_order_follows_from_seed_and_epoch():
    def orders(seed):
        sampler = StepSampler(make_token_rows(40), 4, 2, 0, 2, seed)
        return [torch.cat([step for step, _ in sampler.deal(epoch)]).tolist() for epoch in range(3)]

    first = orders(1)
    assert first == orders(1)
    assert len({tuple(order) for order in first + orders(2)}) == 6
    assert all(sorted(order) == list(range(40)) for order in first)


def test_epochs_are_counted_in_steps():
    epochs = [step[0].epoch for step in deal_steps(make_token_rows(10), 2, 2, 1, epochs=2)]
    torch.testing.assert_close(epochs, [1 / 3, 2 / 3, 1.0, 4 / 3, 5 / 3, 2.0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_padding_share(size):
    rows = make_token_rows(size[0])
    batches = [b for step in deal_steps(rows, *size[1:]) for part in step for b in part.batches]
    batches = [b for b in batches if (b.targets != IGNORE).any()]
    share = sum(int((b.ids == 0).sum()) for b in batches) / sum(b.ids.numel() for b in batches)
    for rank in range(size[3]):
        sampler = StepSampler(rows, *size[1:3], rank, size[3], 42)
        assert sampler.padding_share() == pytest.approx(share, abs=1e-12)
