"""The value of --columns: the data's names for the columns of a format."""

from __future__ import annotations

from options.errors import UserError

EXAMPLE = "question=prompt,answer=reply"  # {the format's column}={the data's}


def parse_columns(text: str) -> dict[str, str]:
    """Return {a column of the format: the data's name for it}. Raises UserError for another text."""
    columns: dict[str, str] = {}
    for part in text.split(","):
        ours, _, theirs = (word.strip() for word in part.partition("="))
        if not ours or not theirs:
            raise UserError(
                f"--columns: {part.strip()!r} does not name two columns; expected the format's name and the"
                f" data's, like {EXAMPLE} (docs/data.md)"
            )
        if ours in columns:
            raise UserError(f"--columns: names the column {ours} twice: {columns[ours]} and {theirs}")
        columns[ours] = theirs
    return columns


def check_columns(text: str) -> str:
    """Return the value of --columns without spaces around its names. Raises UserError if it is malformed."""
    return ",".join(f"{ours}={theirs}" for ours, theirs in parse_columns(text).items())


def check_column_options(columns: str | None, text_column: str | None) -> None:
    """Raise UserError if --text_column is empty or both it and --columns say which column is the text."""
    if text_column is not None and not text_column.strip():
        raise UserError("--text_column: needs the name of a column of the data")
    if text_column is not None and columns is not None and "text" in parse_columns(columns):
        raise UserError("--text_column: is text=NAME of --columns, which names the text too; leave one out")
