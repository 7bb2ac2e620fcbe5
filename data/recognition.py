"""Recognise the format of a data set from all its rows, and find the columns that are not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from data.formats import FORMATS, Format, join_columns
from options.errors import UserError

RECOGNISED_FORMATS = tuple(name for name, form in FORMATS.items() if not form.only_by_name)


def recognise_format(
    rows: Sequence[Mapping],
    origins: Sequence[str],
    error_prefix: str,
    markers: Sequence[str],
    preferred: str | None = None,
) -> str:
    """Return the name of the one format that fits all rows. Rows without content fit any.

    Args:
        rows: {column: value} of each.
        origins: the file and line of each row, for messages.
        error_prefix: begins each error.
        markers: texts that begin the turns of the two speakers in a guanaco text.
        preferred: a format that is tried before all others.

    Raises UserError if rows fit different formats, since one format would learn the prompts of another or
    drop its rows, and if no format fits.
    """
    row_indices: dict[str, list[int]] = {}  # by format
    for i, row in enumerate(rows):
        name = find_row_format(row, markers, preferred)
        if name is not None:
            row_indices.setdefault(name, []).append(i)
    if len(row_indices) > 1:
        kinds = ", ".join(
            f"{len(indices):,} {name} (first {origins[indices[0]]})" for name, indices in row_indices.items()
        )
        raise UserError(
            f"{error_prefix}: its rows are of different formats: {kinds}; --dataset_format, or a recipe's"
            " format, reads all as one, or put each kind into a file of its own"
        )
    columns = {column for row in rows for column, value in row.items() if value is not None}
    return next(iter(row_indices), None) or _match_columns(
        columns or {column for row in rows for column in row}, error_prefix
    )


def find_row_format(row: Mapping, markers: Sequence[str], preferred: str | None = None) -> str | None:
    """Return the name of the first format that fits a row, `preferred` before others; None if none does."""
    names = (preferred, *RECOGNISED_FORMATS) if preferred else RECOGNISED_FORMATS
    return next((name for name in names if fits_format(row, FORMATS[name], markers)), None)


def fits_format(row: Mapping, form: Format, markers: Sequence[str]) -> bool:
    """Return whether a row has content in the columns that a format requires, and the answer's marker.

    The answer may be empty, and only formats with markers need one. It is not enough that the columns are
    there: tables give every row all columns.
    """
    for column in form.required:
        if column not in row or (column != form.answer_column and not _has_content(row[column])):
            return False
    return not form.has_markers or markers[1] in str(row["text"])


def _has_content(value) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value != [] and value != {}


def _match_columns(columns: set[str], error_prefix: str) -> str:
    """Return the format of rows without content, by their columns alone; `check_row` reports what they lack.

    Raises UserError if no format fits.
    """
    formats = {name: FORMATS[name] for name in RECOGNISED_FORMATS if not FORMATS[name].has_markers}
    for name, form in formats.items():
        if columns >= set(form.required):
            return name
    required = "; ".join(f"{name}: {', '.join(form.required)}" for name, form in formats.items())
    sharegpt = "conversations" in columns
    raise UserError(
        f"{error_prefix}: columns {join_columns(sorted(columns))} fit no format ({required}); a recipe's"
        " `columns` says which of them to read as these"
        + "; conversations must hold messages with role and content (ShareGPT's have from and value)"
        * sharegpt
    )


def describe_unread_columns(rows: Iterable[Mapping], form: Format, renamed: Iterable[str] = ()) -> str:
    """Return one text of the names of columns with a value that the format does not read; "" if none.

    renamed: columns that are read under another name.
    """
    read = {*form.required, *form.optional, *renamed}
    found = dict.fromkeys(column for row in rows for column, value in row.items() if value is not None)
    return join_columns([column for column in found if column not in read])
