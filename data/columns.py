"""Rename columns from the data's names to a format's: --columns, --text_column, and `columns` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
        is_of_mixture: whether the data is one of several sets that have these names, for errors.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    named_by: Mapping[str, str] = field(default_factory=dict)
    must_exist: bool = True
    is_of_mixture: bool = False

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
        return replace(self, names=names, named_by=named_by)

    def without(self, columns: Mapping[str, str]) -> ColumnNames:
        """Return the names of all other columns. columns: the keys are those to leave out."""
        names = {ours: theirs for ours, theirs in self.names.items() if ours not in columns}
        named_by = {ours: self.named_by[ours] for ours in names}
        return replace(self, names=names, named_by=named_by)

    def rename(self, rows: list[dict], error_prefix: str) -> tuple[list[dict], ColumnNames]:
        """Return (the rows, which have each column under the format's name too; the names of those columns).

        A row without a column that other rows have gets nothing under the format's name. What the row itself
        has there is another column. Raises UserError as `find_in` does. error_prefix: begins the error.
        """
        present = self.find_in(rows, error_prefix)
        return [_rename_row(row, present.names) for row in rows] if present.names else rows, present

    def find_in(self, rows: list[dict], error_prefix: str) -> ColumnNames:
        """Return the names of the columns that any row has.

        Raises UserError for a column that the data does not have, but must. error_prefix: begins the error.
        """
        present = {ours: theirs for ours, theirs in self.names.items() if any(theirs in row for row in rows)}
        for ours in self.names if self.must_exist else ():
            if ours not in present:
                known = join_columns(dict.fromkeys(str(column) for row in rows for column in row))
                raise UserError(
                    f"{error_prefix}: {self.named_by[ours]}: the data has no column"
                    f" {join_columns([self.names[ours]])}; its columns are {known}{self._remedy()}"
                )
        return ColumnNames(present, {ours: self.named_by[ours] for ours in present})

    def describe(self) -> dict[str, str]:
        """Return {a column of the format: the data's column and what names it}, for errors about rows."""
        return {
            ours: f"{join_columns([theirs])} ({self.named_by[ours]})" for ours, theirs in self.names.items()
        }

    def _remedy(self) -> str:
        """Return the end of the error about a column that the data does not have."""
        if not self.is_of_mixture:
            return " (docs/data.md)"
        return "; the names are for every set of the mixture, and a recipe names those of one (docs/data.md)"


def _rename_row(row: dict, names: Mapping[str, str]) -> dict:
    """Return a row with its columns under the format's names too. names: {the format's name: the row's}."""
    kept = {column: value for column, value in row.items() if column not in names}
    return kept | {ours: row[theirs] for ours, theirs in names.items() if theirs in row}


NO_NAMES = ColumnNames()
