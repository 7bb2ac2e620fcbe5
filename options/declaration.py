"""Declaration of an option: one field of a frozen dataclass, with all that help, checks and errors need."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

REQUIRED = object()  # the default of an option that must be given
AUTO = -1  # the value of a number that is given as `auto`, until the start of a run decides it


@dataclass(frozen=True)
class Range:
    """The finite numbers that an option accepts.

    Attributes:
        ge, gt, le, lt: bounds: at least, above, at most, below; None = no bound.
        sentinel: one number outside of them with a meaning of its own, such as -1.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    sentinel: float | None = None

    def contains(self, number: float) -> bool:
        """Whether the option accepts this number."""
        if number == self.sentinel:
            return True
        return (
            math.isfinite(number)
            and (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
            and (self.lt is None or number < self.lt)
        )

    def __str__(self) -> str:
        """Return the text for `must be ...`, of whole numbers."""
        return self.describe(is_whole=True)

    def describe(self, is_whole: bool) -> str:
        """Return the text for `must be ...`. Of whole numbers, 1 or more are the positive ones."""
        if self.ge is not None and self.le is not None:
            text = f"from {self.ge} to {self.le}"
        else:
            low = "" if self.ge is None else f"at least {self.ge}"
            low = low if self.gt is None else f"above {self.gt}"
            high = "" if self.le is None else f"at most {self.le}"
            high = high if self.lt is None else f"below {self.lt}"
            text = " and ".join(filter(None, (low, high)))
            if not high and self.ge is not None:
                text = "positive" if self.ge == 1 and is_whole else f"{self.ge} or more"
        return text if self.sentinel is None else f"{text}, or {self.sentinel}"

    @property
    def has_upper_bound(self) -> bool:
        """Whether it is limited upwards. Help lines show only such ranges: the others are obvious."""
        return self.le is not None or self.lt is not None


def option(
    default: Any,
    group: str,
    help: str,
    choices: tuple = (),
    needs: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    sentinel: float | None = None,
    repeat: bool = False,
    commas: bool = False,
    convert: Callable[[str], Any] | None = None,
    noun: str = "",
    auto: bool = False,
) -> Any:
    """Declare one option as a field of a dataclass.

    Args:
        default: its value if it is not given; REQUIRED if it must be given.
        group: its heading in --help.
        help: its line in --help: the unit, and the meaning of a sentinel ("-1 = all").
        choices: the accepted values; () = any of its type.
        needs: an attribute of Method; the option has no effect with train types that do not have it.
        ge, gt, le, lt, sentinel: its Range, for numbers.
        repeat: whether it may be given several times; its value is a list of texts.
        commas: whether it takes comma-separated values; in a YAML file they may also be a list.
        convert: turns a text into its value. Raises UserError, or ValueError if the text is not `noun`.
        noun: what a text must be, for errors; "" = as its type says.
        auto: whether a positive whole number may also be given as `auto`, which becomes AUTO.
    """
    bounds = (ge, gt, le, lt, sentinel)
    within = None if all(bound is None for bound in bounds) else Range(*bounds)
    assert not (repeat and (choices or within or convert)), "each of several texts is taken unchanged"
    meta = {
        "group": group,
        "help": help,
        "choices": choices,
        "needs": needs,
        "within": within,
        "repeat": repeat,
        "commas": commas,
        "convert": convert,
        "noun": noun or ("a whole number, or auto" if auto else ""),
        "auto": auto,
        "positional": "",
    }
    return dataclasses.field(default=default, metadata=meta)


def argument(name: str, help: str, several: bool = False) -> Any:
    """Declare a positional argument as a field of a dataclass.

    Args:
        name: what --help calls it, such as RUN.
        help: its line in --help.
        several: whether it may be repeated; its value is then a list.
    """
    declared = option(REQUIRED, "", help, repeat=several)
    return dataclasses.field(default=REQUIRED, metadata=dict(declared.metadata) | {"positional": name})


def option_fields(options: type) -> dict[str, dataclasses.Field]:
    """Return the fields of a dataclass that `option` or `argument` declared, {name: field}."""
    return {field.name: field for field in dataclasses.fields(options) if "help" in field.metadata}


def format_value(value) -> str:
    """Return an option's value as users write it: true, or 1,2 for a tuple; unset for None.

    A text of several lines becomes one line: its beginning, its length and a digest.
    """
    if isinstance(value, str) and "\n" in value:
        digest = hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()[:8]
        return f"{value.splitlines()[0][:60]} ... ({len(value):,} characters, SHA-256 {digest}...)"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
