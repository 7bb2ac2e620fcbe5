"""A tokenized data set: all its examples one after the other in flat tensors, which processes can share.

Shapes: N tokens of all examples, R examples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

IGNORE = -100  # the target of a position that is not learned, as in torch's cross-entropy


@dataclass(frozen=True)
class TokenizedRows:
    """All examples of a data set, one after the other.

    Attributes:
        tokens: [N] int32.
        learned: [N] bool; whether the token is a target.
        starts: [R + 1] int64; example i is tokens[starts[i]:starts[i+1]].
        dropped: number of rows without a target, which are left out.
        cut: number of kept rows that lost their end to context_length.
        row_numbers: [R] int64; the number, from 1, of each example's row in the dataset.
    """

    tokens: torch.Tensor
    learned: torch.Tensor
    starts: torch.Tensor
    dropped: int
    cut: int
    row_numbers: torch.Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

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
