"""Sharding, accumulation, checkpointing and the number of ranks change only speed and memory.

tests/helpers/parity.py has the tolerances and their reasons.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from options.methods import METHODS
from tests.helpers.parity import PLAIN, TYPES, arguments, assert_same, biased_checkpoint
from tests.helpers.products import slow
from tests.helpers.runs import set_up, train_run

# Slow: tests/test_matrix.py trains each type on two ranks, with more options.
QUICK = ("full", "bnb_dora", "hqq_llama_pro")


@pytest.mark.parametrize("train_type", [*QUICK, *slow(t for t in TYPES if t not in QUICK)])
def test_two_ranks_equal_one(train_type, checkpoints, short_rows, plain_run, two_ranks):
    args = arguments(checkpoints(biased_checkpoint(train_type)), short_rows, train_type)
    plain = plain_run([*args, *PLAIN])
    first, second = two_ranks(train_run, [*args, "--batch_size", "2"])
    assert first[0] == second[0]  # both ranks report the loss of the whole step
    assert_same(plain, first)


@pytest.mark.parametrize("train_type", ["full", "bnb_dora"])
def test_tied_embeddings_in_two_ranks(train_type, checkpoints, short_rows, one_rank, two_ranks):
    args = arguments(checkpoints("qwen2"), short_rows, train_type)
    plain = one_rank(train_run, [*args, "--batch_size", "4"])[0]
    assert_same(plain, two_ranks(train_run, [*args, "--batch_size", "2"])[0])


# Slow: test_matrix.py also runs --no_sync.
@pytest.mark.parametrize("no_sync", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_accumulation_equals_one_big_batch(no_sync, checkpoints, short_rows, one_rank, two_ranks, plain_run):
    """Answers have 1 to 13 numbers: a mean of micro-batch means would be far off."""
    args = arguments(checkpoints(), short_rows, "bnb_dora")
    plain = plain_run([*args, *PLAIN])
    small = ["--batch_size", "1", "--gradient_accumulation_steps"]
    assert_same(plain, one_rank(train_run, [*args, *small, "4", "--no_sync", no_sync])[0])
    assert_same(plain, two_ranks(train_run, [*args, *small, "2", "--no_sync", no_sync])[0])


def test_no_sync_reduces_once_per_step(checkpoints, short_rows, two_ranks):
    args = arguments(
        checkpoints(), short_rows, "lora", "--batch_size", "2", "--gradient_accumulation_steps", "4"
    )
    args[args.index("--max_steps") + 1] = "1"
    often, once = (two_ranks(count_reductions, [*args, "--no_sync", v])[0] for v in ("false", "true"))
    assert often == 4 * once == 4 * 3  # three layers have gradients


def count_reductions(rank_info, args) -> int:
    """Count the gradient reductions of a run."""
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    calls, original = [], getattr(dist, name)
    setattr(dist, name, lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    try:
        train_run(rank_info, args)
    finally:
        setattr(dist, name, original)
    return len(calls)


@pytest.mark.parametrize("train_type", ["full", "lora", "bnb_dora", "bnb_llama_pro"])
def test_gradient_checkpointing_changes_nothing(train_type, checkpoints, short_rows, one_rank):
    args = arguments(checkpoints(biased_checkpoint(train_type)), short_rows, train_type, "--batch_size", "2")
    if METHODS[train_type].adapter:
        args += ["--lora_dropout", "0.2"]  # recomputation must draw the same dropout
    on, off = (one_rank(train_run, [*args, "--use_gradient_checkpointing", v])[0] for v in ("true", "false"))
    assert_same(on, off, tensors=1e-6)


def test_an_epoch_that_does_not_divide(checkpoints, short_rows, one_rank, two_ranks):
    """16 rows in steps of 12: the last step of each epoch has 4 rows, which leave one rank without any."""
    args = arguments(checkpoints(), short_rows, "lora", "--dataset_samples", "16", "--num_epochs", "2")
    args += ["--max_steps", "4"]
    plain = one_rank(train_run, [*args, "--batch_size", "12"])[0]
    assert len(plain[0]) == 4
    assert_same(plain, two_ranks(train_run, [*args, "--batch_size", "6"])[0])


def test_dropout_is_drawn_apart_on_each_rank_and_repeats(checkpoints, short_rows, two_ranks):
    args = arguments(checkpoints(), short_rows, "lora", "--lora_dropout", "0.5", "--batch_size", "2")
    first, again = (two_ranks(train_run, args)[0] for _ in range(2))
    assert first[0] == again[0]
    drawn, others = two_ranks(draw_after_set_up, args)
    assert not torch.equal(drawn, others)


def draw_after_set_up(rank_info, args) -> torch.Tensor:
    set_up(rank_info, args)
    return torch.rand(8)
