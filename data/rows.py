"""A data set as tokens: all its examples one after the other in flat tensors, which processes can share.

Shapes: N tokens of all examples, R examples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

IGNORE = -100  # the target of a position that is not learned, as in torch's cross-entropy


@dataclass(frozen=True)
class TokenizedRows:
    """All examples, one after the other. tokens [N] int32; learned [N] bool: the token is a target;
    starts [R + 1] int64: example i is tokens[starts[i]:starts[i+1]]; dropped: rows without a target; cut:
    kept rows that lost their end to context_length; numbers [R] int64: of the examples' rows in the dataset,
    from 1."""

    tokens: torch.Tensor
    learned: torch.Tensor
    starts: torch.Tensor
    dropped: int
    cut: int
    numbers: torch.Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self) -> torch.Tensor:
        return self.starts.diff()

    def targets(self) -> torch.Tensor:
        """Learned tokens of each example, without its first token, which nothing predicts: [R]."""
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), self.learned.long().cumsum(0)])
        return sums[self.starts[1:]] - sums[self.starts[:-1] + 1]


def digest_rows(rows: TokenizedRows) -> str:
    """A digest of the rows as they are trained on: tokens, targets, bounds."""
    total = hashlib.sha256()
    for tensor in (rows.tokens, rows.learned, rows.starts):
        total.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()
