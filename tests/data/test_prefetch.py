from __future__ import annotations

import threading

import pytest
import torch

from data.batches import StepSampler
from data.prefetch import prefetch_steps
from tests.helpers.token_rows import make_token_rows

CPU = torch.device("cpu")


def test_the_same_steps_in_their_order():
    def steps():
        return StepSampler(make_token_rows(17), 2, 2, 0, 1, 42).steps(2)

    plain, early = list(steps()), list(prefetch_steps(steps(), CPU, pin=False))
    assert [s.epoch for s in early] == [s.epoch for s in plain]
    for a, b in zip(plain, early, strict=True):
        assert all(torch.equal(x.ids, y.ids) for x, y in zip(a.batches, b.batches, strict=True))


def test_a_step_is_made_while_the_one_before_is_in_use():
    second = threading.Event()

    def steps():
        yield "first"
        second.set()
        yield "second"

    early = prefetch_steps(steps(), CPU, pin=False)
    assert next(early) == "first"
    assert second.wait(timeout=30)
    assert list(early) == ["second"]


def test_an_error_comes_where_the_step_would():
    def steps():
        yield "first"
        raise OSError("the disk is gone")

    early = prefetch_steps(steps(), CPU, pin=False)
    assert next(early) == "first"
    with pytest.raises(OSError, match="the disk is gone"):
        next(early)


def test_a_loop_that_ends_early_ends_the_thread():
    before = threading.active_count()
    early = prefetch_steps(StepSampler(make_token_rows(17), 2, 2, 0, 1, 42).steps(2), CPU, pin=False)
    next(early)
    assert threading.active_count() == before + 1
    early.close()
    assert threading.active_count() == before


def test_a_thread_that_makes_batches_and_fails_is_told():
    """In its turn: after the steps that it made, and not by waiting for ever."""

    def steps():
        yield from ("first", "second")
        raise OSError("the disk is gone")

    made = prefetch_steps(steps(), torch.device("cpu"), pin=False)
    assert [next(made), next(made)] == ["first", "second"]
    with pytest.raises(OSError, match="the disk is gone"):
        next(made)


def test_batches_stay_where_page_locking_is_refused(monkeypatch):
    asked = []

    def refuse(tensor):
        asked.append(tensor)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)

    def steps():
        return StepSampler(make_token_rows(17), 2, 2, 0, 1, 42).steps(2)

    for plain, made in zip(steps(), prefetch_steps(steps(), CPU, pin=True), strict=True):
        for a, b in zip(plain.batches, made.batches, strict=True):
            assert torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets)
    tensors_of_a_batch = 4
    assert len(asked) == tensors_of_a_batch * 2, "for the first step only, which has two batches"
