"""Rename columns from the data's names to a format's: --columns, --text_column, and `columns` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from data.row_files import Rows
from data.schemas import join_columns
from options.errors import UserError


@dataclass(frozen=True)
class ColumnNames:
    """The data's names for columns of a format.

    Attributes:
        names: {a column of a format: the data's name for it}.
        origins: {the same column: what names it, such as "--columns question=prompt"}, for errors.
        must_exist: whether the data must have all of them. If not, those that it has are renamed.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    must_exist: bool = True

    @classmethod
    def from_recipe(cls, columns: Mapping[str, str], error_prefix: str) -> ColumnNames:
        """Return the names of a recipe's `columns`. error_prefix: the option that names the recipe's data."""
        origin = f"{error_prefix}: `columns` of the recipe"
        return cls(columns, dict.fromkeys(columns, origin))

    def without(self, columns: Mapping[str, str]) -> ColumnNames:
        """Return the names of all other columns. columns: the keys are those to leave out."""
        names = {ours: theirs for ours, theirs in self.names.items() if ours not in columns}
        return ColumnNames(names, self.origins, self.must_exist)

    def rename(self, data: Rows) -> tuple[Rows, dict[str, str]]:
        """Return (the rows, which have each column under the format's name too; origins of those renamed).

        Raises UserError for a column that the data does not have, but must.
        """
        present = {
            ours: theirs for ours, theirs in self.names.items() if any(theirs in row for row in data.rows)
        }
        for ours in self.names if self.must_exist else ():
            if ours not in present:
                known = join_columns(dict.fromkeys(str(column) for row in data.rows for column in row))
                raise UserError(
                    f"{self.origins[ours]}: the data has no column {join_columns([self.names[ours]])}; its"
                    f" columns are {known} (docs/data.md)"
                )
        rows = data.rows
        if present:
            rows = [
                row | {ours: row[theirs] for ours, theirs in present.items() if theirs in row} for row in rows
            ]
        return replace(data, rows=rows), {ours: self.origins[ours] for ours in present}
