"""The learning-rate schedule, by its values."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from optimizers import lr_factor, make_optimizer, make_schedule


def factors(total: int, warmup: float, kind: str) -> list[float]:
    return [lr_factor(step, total, warmup, kind) for step in range(total)]


def test_warm_up_rises_to_the_peak_and_no_step_is_lost():
    assert factors(10, 0.4, "constant") == pytest.approx([0.25, 0.5, 0.75, 1] + [1] * 6)
    assert factors(4, 0.0, "constant") == [1] * 4


def test_linear_falls_towards_zero():
    assert factors(5, 0.0, "linear") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert factors(10, 0.2, "linear")[1:3] == pytest.approx([1, 1])


def test_cosine_falls_towards_a_tenth():
    values = factors(1000, 0.1, "cosine")
    assert (
        values[100] == 1 and values[550] == pytest.approx(0.55) and values[-1] == pytest.approx(0.1, abs=1e-4)
    )
    assert all(a >= b for a, b in pairwise(values[100:]))


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_short_runs_have_a_rate(total, kind, warmup):
    assert all(0 < f <= 1 for f in factors(total, warmup, kind))


def test_scheduler_applies_the_factor_from_the_first_step():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = make_optimizer([parameter], "sgd", lr=0.5, weight_decay=0.0)
    schedule, seen = make_schedule(optimizer, 4, 0.5, "linear"), []
    for _ in range(4):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.25, 0.5, 0.5, 0.25])
