"""Strict JSON parsing, and numbers that remember how they were written.

Python's own parser accepts NaN and Infinity, which are not JSON, turns 1e400 into infinity, and loses the
difference between 1.10 and 1.1, and between -0 and 0.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any


class ExactFloat(float):
    """A float that remembers its text in the file. In all other ways it is an ordinary float."""

    __slots__ = ("text",)
    text: str

    @classmethod
    def make(cls, value: float, text: str) -> float:
        """Return `value` with its text, or an ordinary float if Python writes it like that anyway."""
        if repr(value) == text:
            return value
        number = cls(value)
        number.text = text
        return number


class MinusZero(int):
    """The integer -0, the only integer whose text Python does not preserve."""

    text = "-0"


def parse_json(text: str, exact: bool = False) -> Any:
    """Return the value of a strict JSON text; with `exact`, its numbers know how they were written.

    exact, which rows of data need: numbers that Python would write differently become ExactFloat or
    MinusZero, and a repeated key of an object is an error.

    Raises json.JSONDecodeError if the text is not JSON; ValueError for NaN, infinity, a number out of range
    or a repeated key; RecursionError if it is nested too deeply.
    """
    if exact:
        return json.loads(
            text,
            parse_float=_parse_exact_float,
            parse_int=_parse_int,
            parse_constant=_reject_constant,
            object_pairs_hook=_make_object,
        )
    return json.loads(text, parse_float=_parse_float, parse_constant=_reject_constant)


def try_parse_json(value: Any) -> Any:
    """Return the parsed value of a JSON text; any other text or value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError):
        return value


def describe_json_type(value: Any) -> str:
    """Return the type of a value of JSON in words, such as "a list", for a message."""
    if isinstance(value, str):
        return "the JSON text of a list" if isinstance(try_parse_json(value), list) else "a text"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, Mapping) else "a number"


def number_text(number: float) -> str:
    """Return a number as it was written, if that is known; else as Python writes it."""
    return number.text if isinstance(number, ExactFloat | MinusZero) else str(number)


def _parse_float(text: str) -> float:
    """Return a number. Raises ValueError if it is too large for a float."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is beyond the range of numbers")
    return value


def _parse_exact_float(text: str) -> float:
    return ExactFloat.make(_parse_float(text), text)


def _parse_int(text: str) -> int:
    return MinusZero() if text == MinusZero.text else int(text)


def _reject_constant(name: str):
    raise ValueError(f"{name} is not a JSON value; write null, or leave it out")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raises ValueError if it has a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice[:40]!r} is repeated in an object")
    return found
