"""Products of options; `make test` runs a part of them and `make test-slow` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest


def slow(cases: Iterable) -> list:
    """Return the cases for parametrize, marked slow. A tuple has a value for each parameter."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.slow) for case in values]


def products(*axes: Iterable, always: Iterable[tuple], left_out: Iterable = ()) -> list:
    """Return all combinations of the axes, for parametrize; those not in `always` are marked slow.

    Args:
        axes: the values of each parameter.
        always: combinations that `make test` runs. Each value of each axis must be in one of them.
        left_out: values without such a combination. A comment names the other test that runs their code.
    """
    axes, always, left_out = [list(axis) for axis in axes], list(always), list(left_out)
    cases = list(product(*axes))
    assert set(always) <= set(cases), "no such combination"
    for i, axis in enumerate(axes):
        missing = set(axis) - {case[i] for case in always}
        assert missing <= set(left_out), f"in no combination of `make test`: {missing - set(left_out)}"
    values = {value for axis in axes for value in axis}
    always_values = {value for case in always for value in case}
    assert set(left_out) <= values - always_values, "left out and not left out"
    return [pytest.param(*case, marks=() if case in always else pytest.mark.slow) for case in cases]
