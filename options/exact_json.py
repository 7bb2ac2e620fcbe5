"""JSON that means what it says, and numbers that keep how they were written.

Python's reader takes NaN and Infinity, which JSON has not, makes infinity of 1e400, and shows 1.10 as 1.1
and -0 as 0.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any


class ExactFloat(float):
    """A number and its text in the file. It computes, compares and shows like the float that it is."""

    __slots__ = ("text",)
    text: str

    @classmethod
    def of(cls, value: float, text: str) -> float:
        """The number itself where it would be written so anyway."""
        if repr(value) == text:
            return value
        number = cls(value)
        number.text = text
        return number


class MinusZero(int):
    """The integer -0, the only one that Python writes otherwise than JSON does."""

    text = "-0"


def parse_json(text: str, exact: bool = False) -> Any:
    """Parse a JSON text.

    With `exact`, as rows of data are read, a number that Python would write otherwise is an ExactFloat, or
    MinusZero, and a key that an object has twice is an error.

    Raises json.JSONDecodeError for what is no JSON, ValueError for what it cannot mean, RecursionError.
    """
    if exact:
        return json.loads(
            text, parse_float=_exact, parse_int=_integer, parse_constant=_refuse, object_pairs_hook=_object
        )
    return json.loads(text, parse_float=_finite, parse_constant=_refuse)


def text_of(number: float) -> str:
    """A number as it was written, where that is known."""
    return number.text if isinstance(number, ExactFloat | MinusZero) else str(number)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is beyond the range of numbers")
    return value


def _exact(text: str) -> float:
    return ExactFloat.of(_finite(text), text)


def _integer(text: str) -> int:
    return MinusZero() if text == MinusZero.text else int(text)


def _refuse(name: str):
    raise ValueError(f"{name} is no value of JSON; write null, or leave it out")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{twice[:40]!r} stands twice in an object")
    return found
