"""options/errors.py: an exception becomes one line without control characters."""

from __future__ import annotations

import pytest

from options.errors import UserError, describe


@pytest.mark.parametrize("error, line", [
    (UserError("a\x1b[2J\nerror: b\x00"), r"a\x1b[2J error: b\x00"),
    # a right-to-left override
    (UserError("folder\u202e/né 日本"), r"folder\u202e/né 日本"),
    (KeyError("\udc80"), r"KeyError: '\udc80'"),
    (ValueError(), "ValueError"),
])  # fmt: skip
def test_an_exception_is_one_harmless_line(error, line):
    assert describe(error) == line
