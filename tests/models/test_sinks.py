"""Attention sinks against their definition: a softmax over keys and one more logit, whose share is dropped.

A stand-in by the definition replaces the variable-length kernel, which a CPU lacks.
"""

from __future__ import annotations

import math

import pytest
import torch

from models import sinks as module
from models.attention import attend_causally, attend_fused, attend_within_rows
from parallel.activation_checkpointing import ATTENTION
from tests.helpers.image_masks import reference_backward
from tests.helpers.packing import reference_attention

HEADS, KEY_HEADS, FEATURES, SCALE = 6, 2, 16, 0.3
BOUNDS = torch.tensor(
    [0, 9, 9, 40, 46, 64, 80], dtype=torch.int32
)  # in two sequences of 40; one row is empty


@pytest.fixture
def stand_ins(monkeypatch) -> None:
    """Replace torch's kernel and its backward by their definition."""
    monkeypatch.setattr(module, "varlen_attn", reference_attention)
    monkeypatch.setattr(module, "varlen_backward", reference_backward)


class GroupedHeads(torch.nn.Module):
    """What attention reads of transformers' module."""

    num_key_value_groups = HEADS // KEY_HEADS
    is_causal = True


def random_inputs(length: int, keys: int | None = None, batch: int = 2) -> list[torch.Tensor]:
    """Return query, key, value and sinks in float64."""
    torch.manual_seed(0)
    shapes = [(batch, HEADS, length, FEATURES), *[(batch, KEY_HEADS, keys or length, FEATURES)] * 2, (HEADS,)]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def definition(query, key, value, sinks, seen: torch.Tensor) -> torch.Tensor:
    """Return attention [B, T, H, D] with sinks. seen: [B or 1, T, S], True where a query sees a key."""
    groups = HEADS // KEY_HEADS
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.mT * SCALE).masked_fill(~seen[:, None], -math.inf)
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    shares = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return (shares @ value).transpose(1, 2)


def seen_keys(length: int, window: int | None, bounds: torch.Tensor | None = None) -> torch.Tensor:
    """Return which keys each query sees: [2, T, T]."""
    positions = torch.arange(length)
    age = positions[:, None] - positions
    seen = ((age >= 0) & (age < (window or length)))[None].repeat(2, 1, 1)
    if bounds is not None:
        rows = torch.stack([torch.arange(2 * length) >= bound for bound in bounds]).sum(0).view(2, length)
        seen &= rows[:, :, None] == rows[:, None]
    return seen


def assert_same(got: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Compare results and the gradients of all inputs, the sinks included."""
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    mine, theirs = (torch.autograd.grad(x, inputs, upstream) for x in (got, expected))
    assert all(gradient.any() for gradient in theirs)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize("window", [None, 5])
def test_the_sink_as_a_key(window, bounds):
    """With transformers' mask of a window, or without one; rows of a pack see only themselves."""
    inputs = random_inputs(40)
    mask = None if window is None else seen_keys(40, window)[:1, None]
    *heads, sinks = inputs
    given = {"scaling": SCALE, "s_aux": sinks, "cu_seq_lens_q": bounds}
    got, _ = attend_fused(GroupedHeads(), *heads, mask, **given)
    assert_same(got, definition(*inputs, seen_keys(40, window, bounds)), inputs)


def test_the_sink_as_a_key_of_whole_sequences():
    inputs = random_inputs(40)
    for window in (None, 5, 40):
        given = {"scaling": SCALE, "s_aux": inputs[3], "sliding_window": window}
        got, _ = attend_causally(GroupedHeads(), *inputs[:3], None, **given)
        assert_same(got, definition(*inputs, seen_keys(40, window)), inputs)


def test_one_token_after_others():
    """It sees all keys, and there is no mask."""
    inputs = random_inputs(1, keys=20)
    got, _ = attend_fused(GroupedHeads(), *inputs[:3], None, scaling=SCALE, s_aux=inputs[3])
    assert_same(got, definition(*inputs, torch.ones(2, 1, 20, dtype=torch.bool)), inputs)


@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize("window", [None, 5, 1])
def test_the_variable_length_kernel_with_sinks(window, bounds, stand_ins):
    inputs = random_inputs(40)
    given = {"scaling": SCALE, "s_aux": inputs[3], "sliding_window": window}
    if bounds is not None:
        given |= {"cu_seq_lens_q": bounds, "max_length_q": 31}
    got, _ = attend_within_rows(torch.nn.Identity(), *inputs[:3], None, **given)
    assert_same(got, definition(*inputs, seen_keys(40, window, bounds)), inputs)


def test_frozen_sinks_get_no_gradient(stand_ins):
    *heads, sinks = random_inputs(40)
    given = {"scaling": SCALE, "s_aux": sinks.detach()}
    attend_within_rows(torch.nn.Identity(), *heads, None, **given)[0].sum().backward()
    assert sinks.grad is None and all(x.grad.any() for x in heads)


@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_extreme_sinks(sink, stand_ins):
    """A small one changes nothing; a large one takes everything."""
    *heads, sinks = random_inputs(40)
    extreme = torch.full_like(sinks, sink)
    without, _ = attend_fused(GroupedHeads(), *heads, None, scaling=SCALE)
    for attend, owner in ((attend_fused, GroupedHeads()), (attend_within_rows, torch.nn.Identity())):
        got, _ = attend(owner, *heads, None, scaling=SCALE, s_aux=extreme)
        torch.testing.assert_close(got, without if sink < 0 else torch.zeros_like(without))


def test_checkpointing_can_save_its_results():
    assert torch.ops.fsdp_finetune.attend_with_sinks.default in ATTENTION
