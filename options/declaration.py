"""How an option is declared: one field of a frozen dataclass, with all that help, checks and errors need."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

REQUIRED = object()  # the default of an option that must be given


@dataclass(frozen=True)
class Range:
    """The finite numbers that an option takes, and one beside them with a meaning of its own, such as -1."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    other: float | None = None

    def holds(self, number: float) -> bool:
        if number == self.other:
            return True
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """As in `must be ...`."""
        if self.least is not None and self.most is not None:
            text = f"from {self.least} to {self.most}"
        else:
            low = "" if self.least is None else f"at least {self.least}"
            low = low if self.above is None else f"above {self.above}"
            high = "" if self.most is None else f"at most {self.most}"
            high = high if self.below is None else f"below {self.below}"
            text = " and ".join(filter(None, (low, high)))
            if not high and self.least is not None:
                text = "positive" if self.least == 1 else f"{self.least} or more"
        return text if self.other is None else f"{text}, or {self.other}"

    @property
    def is_obvious(self) -> bool:
        """Whether help need not tell it: no upper bound, and nothing below 0."""
        return self.most is None and self.below is None


def option(
    default: Any,
    group: str,
    help: str,
    choices: tuple = (),
    needs: str = "",
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    other: float | None = None,
    repeat: bool = False,
    commas: bool = False,
    convert: Callable[[str], Any] | None = None,
    noun: str = "",
) -> Any:
    """Declares one option as a field of a dataclass.

    Args:
        default: its value where it is not given; REQUIRED if it must be.
        group: its heading in --help.
        help: the line there: the unit, and the meaning of a sentinel ("-1 = all").
        choices: the values that it takes; () = any of its type.
        needs: the attribute of Method without which it has no effect.
        least, above, most, below, other: its Range, of numbers.
        repeat: whether it may be given several times: a list of texts.
        commas: whether it takes several values, comma-separated: in a file they may be a list.
        convert: makes its value of a text; raises ValueError for one that is not `noun`, or UserError.
        noun: what a text must be, for errors; "" = as its type says.
    """
    bounds = (least, above, most, below, other)
    within = None if all(bound is None for bound in bounds) else Range(*bounds)
    assert not (repeat and (choices or within or convert)), "each of several texts is taken as it is"
    meta = {
        "group": group,
        "help": help,
        "choices": choices,
        "needs": needs,
        "within": within,
        "repeat": repeat,
        "commas": commas,
        "convert": convert,
        "noun": noun,
        "positional": "",
    }
    return dataclasses.field(default=default, metadata=meta)


def argument(name: str, help: str, several: bool = False) -> Any:
    """Declares what stands on a command line without an option's name. several: any number of them, a
    list."""
    declared = option(REQUIRED, "", help, repeat=several)
    return dataclasses.field(default=REQUIRED, metadata=dict(declared.metadata) | {"positional": name})


def options_of(kind: type) -> dict[str, dataclasses.Field]:
    """The options that a dataclass declares, by name; its other fields are none."""
    return {field.name: field for field in dataclasses.fields(kind) if "help" in field.metadata}


def shown(value) -> str:
    """A value as users write it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
