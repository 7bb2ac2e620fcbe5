"""Recognise the format of a data set from all its rows, and find the columns that are not read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from data.formats import FORMATS
from data.image_store import IMAGE_COLUMNS
from data.schemas import Auto, Schema, join_columns
from options.errors import UserError

# A format and one of its schemas, in which rows may be read.
Candidate = tuple[str, Schema]
PAGE = "docs/data.md"


def list_candidates(
    has_template: bool,
    preferred: str | None = None,
    columns: Collection[str] = (),
    has_images: bool = False,
) -> list[Candidate]:
    """Return what rows may be recognised as, in the order in which it is tried.

    Args:
        has_template: whether the tokenizer has a chat template.
        preferred: a format whose schemas are tried before all others.
        columns: all of these must be read.
        has_images: whether rows have images. With a chat template all but texts are conversations then. A
            text of a dialogue cannot show them; it is recognised so that it is refused, not learned whole.
    """
    candidates = [(preferred, schema) for schema in FORMATS[preferred].schemas] if preferred else []
    if has_images and has_template:
        names = ("chat", "guanaco", "completion")
        candidates += [(name, schema) for name in names for schema in FORMATS[name].schemas]
    else:
        for auto in (Auto.ALWAYS, Auto.WITH_TEMPLATE if has_template else Auto.WITHOUT_TEMPLATE):
            candidates += [
                (name, schema)
                for name, form in FORMATS.items()
                for schema in form.schemas
                if schema.auto == auto
            ]
    return [(name, schema) for name, schema in candidates if set(schema.columns) >= set(columns)]


def recognise_format(
    rows: Sequence[Mapping],
    origins: Sequence[str],
    error_prefix: str,
    markers: Sequence[str],
    candidates: Sequence[Candidate],
) -> Candidate:
    """Return the one format and schema that fit all rows. Rows without content fit any.

    Args:
        rows: {column: value} of each.
        origins: the file and line of each row, for messages.
        error_prefix: begins each error.
        markers: texts that begin the turns of the two speakers in a guanaco text.
        candidates: from `list_candidates`.

    Raises UserError if rows fit different ones, since one format would learn the prompts of another or drop
    its rows, and if none fits.
    """
    row_indices: dict[Candidate, list[int]] = {}
    for i, row in enumerate(rows):
        found = find_candidate(row, markers, candidates)
        if found is not None:
            row_indices.setdefault(found, []).append(i)
    if len(row_indices) > 1:
        kinds = ", ".join(
            f"{len(indices):,} {_describe(candidate)} (first {origins[indices[0]]})"
            for candidate, indices in row_indices.items()
        )
        raise UserError(
            f"{error_prefix}: its rows are of different formats: {kinds}; --dataset_format, or a recipe's"
            f" format, reads all as one, or put each kind into a file of its own ({PAGE})"
        )
    columns = {column for row in rows for column, value in row.items() if value is not None}
    return next(iter(row_indices), None) or _match_columns(
        columns or {column for row in rows for column in row}, error_prefix, candidates
    )


def find_candidate(row: Mapping, markers: Sequence[str], candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the first candidate that fits a row; None if none does.

    A row of a format with markers must have that of an answer.
    """
    for name, schema in candidates:
        if schema.fits(row) and (not FORMATS[name].has_markers or markers[1] in str(row["text"])):
            return name, schema
    return None


def _describe(candidate: Candidate) -> str:
    """Return "chat", or "chat of prompt, response" if the schema is not the format's first one."""
    name, schema = candidate
    return name if schema == FORMATS[name].schemas[0] else f"{name} of {', '.join(schema.required)}"


def _match_columns(columns: set[str], error_prefix: str, candidates: Sequence[Candidate]) -> Candidate:
    """Return what rows without content are, by their columns alone; `Schema.read` reports what they lack.

    Raises UserError if no candidate fits.
    """
    required: dict[str, list[str]] = {}  # by format
    for name, schema in candidates:
        if FORMATS[name].has_markers:
            continue
        if columns >= set(schema.required):
            return name, schema
        required.setdefault(name, []).append(", ".join(schema.required))
    known = "; ".join(f"{name}: {' or '.join(dict.fromkeys(sets))}" for name, sets in required.items())
    raise UserError(
        f"{error_prefix}: columns {join_columns(sorted(columns))} fit no format ({known}); --columns, or a"
        f" recipe's `columns`, says which of them to read as these ({PAGE})"
    )


def select_schemas(name: str, columns: Mapping[str, str], error_prefix: str) -> list[Schema]:
    """Return the schemas of a format that read all of some columns.

    Args:
        name: of the format.
        columns: {a column: what named it, such as "--columns question=prompt"}.
        error_prefix: begins the error.

    Raises UserError if no schema does.
    """
    schemas = FORMATS[name].schemas
    check_columns_are_read(columns, schemas, error_prefix, name)
    return [schema for schema in schemas if set(schema.columns) >= set(columns)]


def check_columns_are_read(
    columns: Mapping[str, str], schemas: Sequence[Schema], error_prefix: str, name: str | None = None
) -> None:
    """Raise UserError if no schema reads all of some columns.

    Args:
        columns, error_prefix: as for `select_schemas`.
        schemas: those of a format, or of all.
        name: the format's name; None = they are of all formats.
    """
    if any(set(schema.columns) >= set(columns) for schema in schemas):
        return
    reader = f"the format {name} does not read" if name else "no format reads"
    known = dict.fromkeys(column for schema in schemas for column in schema.columns)
    for column, origin in columns.items():
        if column not in known:
            raise UserError(
                f"{error_prefix}: {origin}: {reader} a column {join_columns([column])}; the columns are"
                f" {', '.join(known)}, and for images {' or '.join(IMAGE_COLUMNS)} ({PAGE})"
            )
    origins = ", ".join(dict.fromkeys(columns.values()))
    raise UserError(
        f"{error_prefix}: {origins}: {reader} the columns {', '.join(columns)} together;"
        f" {PAGE} lists which go together"
    )


def list_unread_columns(
    rows: Iterable[Mapping], schemas: Iterable[Schema], renamed: Iterable[str] = ()
) -> list[str]:
    """Return the names of columns with a value that are not read.

    Args:
        rows: {column: value} of each.
        schemas: the schema of each row.
        renamed: columns that are read under another name.
    """
    elsewhere = {*renamed}
    found = dict.fromkeys(
        column
        for row, schema in zip(rows, schemas, strict=True)
        for column, value in row.items()
        if value is not None and column not in schema.columns and column not in elsewhere
    )
    return [*found]
