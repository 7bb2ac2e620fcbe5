"""A tokenized data set: all its examples one after the other in flat tensors, which processes can share.

Shapes: N tokens of all examples, R examples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from data.row_reasons import RowReason

IGNORE = -100  # the target of a position that is not learned, as in torch's cross-entropy


@dataclass(frozen=True)
class TokenizedRows:
    """All examples of a data set, one after the other.

    Attributes:
        tokens: [N] int32.
        learned: [N] bool; whether the token is a target.
        starts: [R + 1] int64; example i is tokens[starts[i]:starts[i+1]].
        drop_reasons: why rows without a target are left out.
        cut_reasons: what kept rows lost to context_length.
        row_numbers: [R] int64; the number, from 1, of each example's row in the dataset.
    """

    tokens: torch.Tensor
    learned: torch.Tensor
    starts: torch.Tensor
    drop_reasons: tuple[RowReason, ...]
    cut_reasons: tuple[RowReason, ...]
    row_numbers: torch.Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def dropped(self) -> int:
        """Number of rows that are left out."""
        return sum(each.count for each in self.drop_reasons)

    @property
    def cut(self) -> int:
        """Number of kept rows that lost their end."""
        return sum(each.count for each in self.cut_reasons)

    def describe_reasons(self) -> list[str]:
        """Return a line on each reason why rows are dropped or cut."""
        return [
            each.describe(action)
            for action, reasons in (("dropped", self.drop_reasons), ("cut", self.cut_reasons))
            for each in reasons
        ]

    def lengths(self) -> torch.Tensor:
        """Return the number of tokens of each example: [R]."""
        return self.starts.diff()

    def targets(self) -> torch.Tensor:
        """Return the number of targets of each example: [R]. Its first token is never one."""
        sums = self.learned.cumsum(0, dtype=torch.int64)  # 8 bytes per token of the data set, for a moment
        return sums[self.starts[1:] - 1] - sums[self.starts[:-1]]


def digest_rows(rows: TokenizedRows) -> str:
    """Return the SHA-256 hex digest of the rows' `tokens`, `learned` and `starts`, in order."""
    digest = hashlib.sha256()
    for tensor in (rows.tokens, rows.learned, rows.starts):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
