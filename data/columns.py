"""Rename columns from the data's names to a format's: --columns, --text_column, and `columns` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from data.schemas import join_columns
from options.columns import parse_columns
from options.errors import UserError


@dataclass(frozen=True)
class ColumnNames:
    """The data's names for columns of a format.

    Attributes:
        names: {a column of a format: the data's name for it}.
        named_by: {the same column: what names it, such as "--columns question=prompt"}, for errors.
        must_exist: whether the data must have all of them. If not, those that it has are renamed.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    named_by: Mapping[str, str] = field(default_factory=dict)
    must_exist: bool = True

    @classmethod
    def from_options(
        cls, columns: str | None, text_column: str | None, must_exist: bool = True
    ) -> ColumnNames:
        """Return the names that --columns and --text_column give."""
        names = parse_columns(columns) if columns else {}
        named_by = {ours: f"--columns {ours}={theirs}" for ours, theirs in names.items()}
        if text_column:
            names["text"], named_by["text"] = text_column, f"--text_column {text_column}"
        return cls(names, named_by, must_exist)

    @classmethod
    def from_recipe(cls, columns: Mapping[str, str]) -> ColumnNames:
        """Return the names of a recipe's `columns`."""
        return cls(columns, dict.fromkeys(columns, "`columns` of the recipe"))

    def over(self, others: ColumnNames) -> ColumnNames:
        """Return these names, and the others for columns that these do not name."""
        names, named_by = {**others.names, **self.names}, {**others.named_by, **self.named_by}
        return ColumnNames(names, named_by, self.must_exist)

    def without(self, columns: Mapping[str, str]) -> ColumnNames:
        """Return the names of all other columns. columns: the keys are those to leave out."""
        names = {ours: theirs for ours, theirs in self.names.items() if ours not in columns}
        named_by = {ours: self.named_by[ours] for ours in names}
        return ColumnNames(names, named_by, self.must_exist)

    def rename(self, rows: list[dict], error_prefix: str) -> tuple[list[dict], ColumnNames]:
        """Return (the rows, which have each column under the format's name too; the names of those columns).

        Raises UserError for a column that the data does not have, but must. error_prefix: begins the error.
        """
        present = {ours: theirs for ours, theirs in self.names.items() if any(theirs in row for row in rows)}
        for ours in self.names if self.must_exist else ():
            if ours not in present:
                known = join_columns(dict.fromkeys(str(column) for row in rows for column in row))
                missing = join_columns([self.names[ours]])
                raise UserError(
                    f"{error_prefix}: {self.named_by[ours]}: the data has no column {missing}; its columns"
                    f" are {known} (docs/data.md)"
                )
        if present:
            rows = [
                row | {ours: row[theirs] for ours, theirs in present.items() if theirs in row} for row in rows
            ]
        named_by = {ours: self.named_by[ours] for ours in present}
        return rows, ColumnNames(present, named_by)


NO_NAMES = ColumnNames()
