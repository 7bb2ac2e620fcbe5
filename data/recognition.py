"""Which format the rows of a data set have, recognised from all of them, and which columns it does not
read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from data.formats import FORMATS, Format
from options.errors import UserError, join_names

RECOGNISED = tuple(name for name, form in FORMATS.items() if not form.named)


def recognise(
    rows: Sequence[Mapping],
    origins: Sequence[str],
    where: str,
    markers: Sequence[str],
    first: str | None = None,
) -> str:
    """Return the one format that all rows have, as far as they hold anything.

    Args:
        places: where each row came from.
        where: what errors begin with.
        markers: of the two speakers in a guanaco text.
        first: a format that goes before all others, where rows have its columns.

    Raises UserError where rows fit different formats, as one of them would learn prompts, or drop rows, of
    another; and where none fits.
    """
    numbers: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        name = format_of(row, markers, first)
        if name is not None:
            numbers.setdefault(name, []).append(i)
    if len(numbers) > 1:
        kinds = ", ".join(f"{len(of):,} {name} (first {origins[of[0]]})" for name, of in numbers.items())
        raise UserError(
            f"{where}: its rows are of different formats: {kinds}; --dataset_format, or a recipe's format,"
            " reads all as one, or put each kind into a file of its own"
        )
    columns = {column for row in rows for column, value in row.items() if value is not None}
    return next(iter(numbers), None) or _by_columns(
        columns or {column for row in rows for column in row}, where
    )


def format_of(row: Mapping, markers: Sequence[str], first: str | None = None) -> str | None:
    """Return the first format that a row fits; None if it fits none, or holds too little."""
    for name in (first, *RECOGNISED) if first else RECOGNISED:
        if fits(row, FORMATS[name], markers):
            return name
    return None


def fits(row: Mapping, form: Format, markers: Sequence[str]) -> bool:
    """Whether the columns that the format needs hold something; the answer's may be empty. Tables give each
    row all columns, so it is not enough that they are there."""
    for column in form.needs:
        if column not in row or (column != form.answer and not _holds(row[column])):
            return False
    return not form.marked or markers[1] in str(row["text"])


def _holds(value) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value != [] and value != {}


def _by_columns(columns: set[str], where: str) -> str:
    """The format of rows that hold nothing to tell it by: `checked` says what they lack."""
    known = {name: FORMATS[name] for name in RECOGNISED if not FORMATS[name].marked}
    for name, form in known.items():
        if columns >= set(form.needs):
            return name
    needs = "; ".join(f"{name}: {', '.join(form.needs)}" for name, form in known.items())
    raise UserError(f"{where}: columns {join_names(sorted(columns))} fit no format ({needs})")


def unread_columns(rows: Iterable[Mapping], form: Format, renamed: Iterable[str] = ()) -> str:
    """Return the names of the columns that hold something and that the format does not read, as a list for a
    line; "" if there are none. renamed: columns that are read under another name."""
    read = {*form.needs, *form.optional, *renamed}
    found = dict.fromkeys(column for row in rows for column, value in row.items() if value is not None)
    return join_names([column for column in found if column not in read])
