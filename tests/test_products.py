"""products() marks the cases that only `make test-slow` runs, and leaves no value to it unnoticed."""

from __future__ import annotations

import re

import pytest

from tests.helpers.products import products


def test_all_combinations_of_which_some_are_slow():
    cases = products("ab", [1, 2], always=[("a", 1), ("b", 2)])
    assert [(*case.values, bool(case.marks)) for case in cases] == [
        ("a", 1, False),
        ("a", 2, True),
        ("b", 1, True),
        ("b", 2, False),
    ]


@pytest.mark.parametrize(
    ("always", "left_out", "error"),
    [
        ([("a", 1), ("a", 2)], [], "in no combination of `make test`: {'b'}"),
        ([("a", 1), ("b", 1)], ["b"], "in no combination of `make test`: {2}"),
        ([("a", 1), ("b", 2)], ["b"], "left out and not left out"),
        ([("a", 1), ("b", 2)], ["c"], "left out and not left out"),
        ([("a", 1), ("b", 3)], [], "no such combination"),
    ],
)
def test_each_value_is_met_or_named(always, left_out, error):
    with pytest.raises(AssertionError, match=re.escape(error)):
        products("ab", [1, 2], always=always, left_out=left_out)
    assert products("ab", [1, 2], always=[("a", 1), ("a", 2)], left_out=["b"])
