"""Products of options, of which `make test` has a part and `make test-slow` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest


def products(*axes: Iterable, always: Iterable[tuple]) -> list:
    """All combinations, for parametrize. always: those that `make test` runs; each value should be in one of them."""
    cases, always = list(product(*axes)), list(always)
    assert set(always) <= set(cases), "no such combination"
    return [pytest.param(*case, marks=() if case in always else pytest.mark.slow) for case in cases]
