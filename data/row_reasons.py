"""Why rows are dropped or cut: counts by reason, with the numbers of the first rows.

The numbers are those of the rows in their dataset, from 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FIRST_ROWS = 3  # numbers that are kept for each reason, however many rows there are

NO_ANSWER = "no answer has any text to learn"
LONG_PROMPT = "the prompt fills --context_length"
FIRST_TOKEN = "only the first token would be learned, which nothing predicts"
LONG_IMAGES = "an image before the answers ends beyond --context_length"
CUT_IMAGE = "an image ends beyond --context_length, so that the row ends before it"
CUT_ANSWER = "the end of an answer is beyond --context_length"
CUT_REST = "only text that is not learned is beyond --context_length"


def name_set(reason: str, name: str) -> str:
    """Return a reason with the name of its rows' dataset; unchanged if the name is ""."""
    return f"{reason}, in {name}" if name else reason


@dataclass(frozen=True)
class RowReason:
    """Rows that were dropped or cut for one reason.

    Attributes:
        reason: the reason as a text.
        count: number of rows.
        first: numbers of the first ones, at most FIRST_ROWS.
    """

    reason: str
    count: int
    first: tuple[int, ...]

    def describe(self, action: str) -> str:
        """Return "12 rows dropped: REASON (rows 3, 8, 15, ...)". action: dropped or cut."""
        plural = "s" if self.count > 1 else ""
        numbers = ", ".join(map(str, self.first)) + ", ..." * (self.count > len(self.first))
        return f"{self.count:,} row{plural} {action}: {self.reason} (row{plural} {numbers})"

    def of_set(self, name: str) -> RowReason:
        """Return the reason with the name of the set in it whose rows the numbers are those of."""
        return replace(self, reason=name_set(self.reason, name))

    def fields(self) -> dict:
        """Return the values for run.json."""
        return {"reason": self.reason, "rows": self.count, "first": list(self.first)}


class ReasonCounter:
    """Counts rows by reason, in the order in which the reasons first occur."""

    def __init__(self):
        self.counts: dict[str, RowReason] = {}

    def add(self, reason: str, row_number: int) -> None:
        """Count a row. row_number: that in its dataset, from 1."""
        found = self.counts.get(reason, RowReason(reason, 0, ()))
        first = (*found.first, row_number)[:FIRST_ROWS]
        self.counts[reason] = RowReason(reason, found.count + 1, first)

    def reasons(self) -> tuple[RowReason, ...]:
        """Return the reasons that occurred."""
        return tuple(self.counts.values())
