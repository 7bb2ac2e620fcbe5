"""Products of options, of which `make test` has a part and `make test-slow` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest


def products(*axes: Iterable, always: Iterable[tuple], left_out: Iterable = ()) -> list:
    """All combinations, for parametrize. always: those that `make test` runs; each value of each axis is in one of them,
    but for those in left_out: something else in `make test` runs their code, which a comment names."""
    axes, always, left_out = [list(axis) for axis in axes], list(always), list(left_out)
    cases = list(product(*axes))
    assert set(always) <= set(cases), "no such combination"
    for i, axis in enumerate(axes):
        missing = set(axis) - {case[i] for case in always}
        assert missing <= set(left_out), f"in no combination of `make test`: {missing - set(left_out)}"
    values = {value for axis in axes for value in axis}
    met = {value for case in always for value in case}
    assert set(left_out) <= values - met, "left out and not left out"
    return [pytest.param(*case, marks=() if case in always else pytest.mark.slow) for case in cases]
