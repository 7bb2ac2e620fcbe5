"""The space of a sweep: which values of which options of train.py its trials try.

A line of space.yaml names an option, and its values or the range that they are from:

    lora_rank: [8, 16, 64]
    lr: {min: 1e-5, max: 1e-3, log: true}
    lora_dropout: {min: 0, max: 0.2, step: 0.05}
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal

from options.command_line import BOOLEANS
from options.config import COMPATIBILITY, FIELDS
from options.declaration import AUTO, format_value
from options.errors import UserError
from options.foreign_rules import FOREIGN
from options.train import COMMAND
from options.unknown_options import describe_arguments
from options.yaml_file import Tree, read_tree

# Groups of options that decide where and how a trial runs and is measured, not what it learns.
FIXED_GROUPS = ("Evaluation", "Launch", "Checkpoints", "Output", "Profiling", COMPATIBILITY)
FIXED_OPTIONS = ("show_rows", "quantized_cache", "loading_workers")
RANGE_KEYS = ("min", "max", "log", "step")

MAX_VALUES = 10_000  # of a range with a step: they are listed for a grid and for wandb
DIGITS = 4  # of a number that a sampler draws: more make no difference to a run, and nobody can type them
Combination = dict[str, str]  # {option: its value, as on a command line}


@dataclass(frozen=True)
class Values:
    """Single values of an option, as on a command line."""

    name: str
    texts: tuple[str, ...]

    @property
    def grid(self) -> tuple[str, ...]:
        """All values."""
        return self.texts

    @property
    def size(self) -> int:
        """Number of values."""
        return len(self.texts)

    def as_json(self) -> list | dict:
        """Return what the file says, to be recorded and compared."""
        return list(self.texts)


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included.

    Attributes:
        is_log: whether equal factors are equally likely, instead of equal differences.
        step: difference of neighbours; None = any number, or for whole numbers on a log scale any of them.
        is_whole: whether they are whole numbers.
    """

    name: str
    low: float
    high: float
    is_log: bool = False
    step: float | None = None
    is_whole: bool = False

    @property
    def size(self) -> float:
        """Number of values, which may be infinite."""
        if self.step is None and not self.is_whole:
            return math.inf
        return int((_decimal(self.high) - _decimal(self.low)) / _decimal(self.step or 1)) + 1

    @property
    def grid(self) -> tuple[str, ...]:
        """All values, of a range that has finitely many."""
        return tuple(self._at(i) for i in range(int(self.size)))

    @property
    def last(self) -> str:
        """The largest value of a range that has finitely many; below `high` if the steps do not reach it."""
        return self._at(int(self.size) - 1)

    def _at(self, index: int) -> str:
        """Return a value of `grid`. In decimals: 0.15, not 0.15000000000000002."""
        value = _decimal(self.low) + index * _decimal(self.step or 1)
        return str(int(value) if self.is_whole else float(value))

    def text(self, value: float) -> str:
        """Return a value as on a command line; where any number may be tried, with DIGITS digits."""
        if self.is_whole:
            return str(int(value))
        if self.step is not None:
            return self._at(round((value - self.low) / self.step))
        return str(min(max(float(f"{value:.{DIGITS}g}"), float(self.low)), float(self.high)))

    def as_json(self) -> list | dict:
        """Return what the file says, to be recorded and compared."""
        bounds = {"min": self.low, "max": self.high}
        return bounds | ({"log": True} if self.is_log else {}) | ({"step": self.step} if self.step else {})


@dataclass(frozen=True)
class Space:
    """The options that a sweep varies, in the order of the file."""

    dimensions: tuple[Values | Range, ...]

    @property
    def names(self) -> list[str]:
        """The names of the options."""
        return [dimension.name for dimension in self.dimensions]

    @property
    def size(self) -> float:
        """Number of combinations, which may be infinite."""
        return math.prod(dimension.size for dimension in self.dimensions)

    def combinations(self) -> Iterator[Combination]:
        """Yield all combinations of a finite space; the last option changes fastest."""
        for texts in itertools.product(*(dimension.grid for dimension in self.dimensions)):
            yield dict(zip(self.names, texts, strict=True))

    def corners(self) -> Iterator[Combination]:
        """Yield combinations to check before a sweep: all of the values, and the ends of the ranges.

        Where there are more than MAX_CORNERS, each value is there once, with the first of the other options.
        """
        ends = [
            d.texts if isinstance(d, Values) else (d.text(d.low), d.text(d.high)) for d in self.dimensions
        ]
        if math.prod(map(len, ends)) <= MAX_CORNERS:
            yield from (dict(zip(self.names, texts, strict=True)) for texts in itertools.product(*ends))
            return
        first = {name: texts[0] for name, texts in zip(self.names, ends, strict=True)}
        yield first
        for name, texts in zip(self.names, ends, strict=True):
            yield from (first | {name: text} for text in texts[1:])

    def as_json(self) -> dict[str, list | dict]:
        """Return the space as the file says it, to be recorded and compared."""
        return {dimension.name: dimension.as_json() for dimension in self.dimensions}


def _decimal(number: float | str) -> Decimal:
    """Return a number as it is written, without the rounding of binary floats."""
    return Decimal(str(number))


MAX_CORNERS = 256  # each is checked as a command line of its own


def read_space(path: str) -> Space:
    """Return the space in a YAML file.

    Raises UserError if it is no such file, is empty, or names an option or a value that train.py does not
    have, or that trials cannot differ in.
    """
    tree, where = read_tree(path), f"--space {path}"
    if not isinstance(tree, dict) or not tree:
        raise UserError(
            f"{where}: expected lines of `option: [value, value]` or `option: {{min: x, max: y}}`"
        )
    dimensions, seen = [], set[str]()
    for key, spec in tree.items():
        name = key.replace("-", "_")
        if name in seen:
            raise UserError(f"{where}: {key} is given a second time")
        seen.add(name)
        if name not in FIELDS:
            raise UserError(
                f"{where}: {describe_arguments([f'--{name}'], [f'--{name}'], {}, FIELDS, FOREIGN)}"
            )
        _check_may_vary(name, where)
        dimensions.append(_read_dimension(name, spec, where))
    return Space(tuple(dimensions))


def _check_may_vary(name: str, where: str) -> None:
    """Raise UserError if trials cannot differ in an option."""
    group = FIELDS[name].metadata["group"]
    if name in FIXED_OPTIONS or group in FIXED_GROUPS:
        reason = "is the same in all trials of a sweep, which are compared"
        raise UserError(f"{where}: {name} {reason}; give --{name} on the command line or in --config")


def _read_dimension(name: str, spec: Tree, where: str) -> Values | Range:
    """Return the values or the range of an option. Raises UserError.

    Args:
        name: the option.
        spec: what the file says.
        where: the file, for errors.
    """
    if isinstance(spec, dict):
        return _read_range(name, spec, where)
    if not isinstance(spec, list):
        raise UserError(
            f"{where}: {name}: expected [value, value] or {{min: x, max: y}}; a single value belongs in"
            " --config"
        )
    if not spec:
        raise UserError(f"{where}: {name} has no value; expected [value, value]")
    texts = [_read_value(name, each, where)[1] for each in spec]
    if twice := [text for i, text in enumerate(texts) if text in texts[:i]]:
        raise UserError(f"{where}: {name} has the value {twice[0]} twice")
    return Values(name, tuple(texts))


def _read_value(name: str, written: Tree, where: str) -> tuple[object, str]:
    """Return (a value in the option's type, as on a command line). Raises UserError.

    written: a text, or a list of texts for options of comma-separated values.
    """
    if isinstance(written, list) and all(isinstance(each, str) for each in written):
        written = ",".join(map(str, written))
    if not isinstance(written, str):
        raise UserError(f"{where}: {name}: {'null' if written is None else written} is not a value")
    try:
        value = COMMAND.read([f"--{name}={written}"])[name]
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    is_auto = value == AUTO and FIELDS[name].metadata["auto"]
    return value, "auto" if is_auto else format_value(value)


def _read_range(name: str, spec: dict[str, Tree], where: str) -> Range:
    """Return the range of an option of numbers. Raises UserError."""
    origin = f"{where}: {name}"
    if unknown := [key for key in spec if key not in RANGE_KEYS]:
        raise UserError(f"{origin}: unknown key {unknown[0]}; a range has {', '.join(RANGE_KEYS)}")
    if missing := [key for key in ("min", "max") if key not in spec]:
        raise UserError(f"{origin}: {missing[0]} is missing; a range is {{min: x, max: y}}")
    if wrong := [key for key in ("min", "max") if not isinstance(spec[key], str)]:
        raise UserError(f"{origin}: {wrong[0]} is not a number")
    ends = [_read_end(name, spec[key], where) for key in ("min", "max")]
    low, high = ends
    is_whole = all(isinstance(end, int) for end in ends)
    is_log = BOOLEANS.get(str(spec.get("log", "false")).lower())
    if is_log is None:
        raise UserError(f"{origin}: log: {spec['log']!r} is not true or false")
    step = _read_step(spec["step"], is_whole, origin) if "step" in spec else None
    if low >= high:
        raise UserError(f"{origin}: min {spec['min']} must be below max {spec['max']}")
    if is_log and (step is not None or low <= 0):
        reason = "step has no effect with log: true" if step is not None else "log: true needs min above 0"
        raise UserError(f"{origin}: {reason}")
    found = Range(name, low, high, is_log, step, is_whole)
    if step is not None and found.size > MAX_VALUES:
        raise UserError(f"{origin}: step {spec['step']} makes more than {MAX_VALUES:,} values; leave it out")
    if found.size < math.inf and _decimal(found.last) != _decimal(high):
        reason = "is not a whole number of steps above min"
        raise UserError(f"{origin}: max {spec['max']} {reason}; {found.last} is")
    return found


def _read_end(name: str, written: Tree, where: str) -> int | float:
    """Return an end of a range. Raises UserError if it is not a number within the option's own range."""
    value, _ = _read_value(name, written, where)
    meta, origin = FIELDS[name].metadata, f"{where}: {name}"
    if isinstance(value, bool) or not isinstance(value, int | float) or meta["choices"]:
        raise UserError(f"{origin} takes no range of numbers; list its values: [value, value]")
    within = meta["within"]
    if not math.isfinite(value) or (within and not replace(within, sentinel=None).contains(value)):
        raise UserError(f"{origin}: {written} cannot be an end of a range; list such values: [value, value]")
    return value


def _read_step(written: Tree, is_whole: bool, origin: str) -> int | float:
    """Return the step of a range. Raises UserError if it is not a positive number of the option's type."""
    try:
        step = (int if is_whole else float)(str(written))
    except ValueError:
        step = 0
    if not 0 < step < math.inf:
        kind = "positive whole number" if is_whole else "positive number"
        raise UserError(f"{origin}: step {written} is not a {kind}")
    return step
