"""A tokenized data set: all its examples one after the other in flat tensors, which processes can share.

Shapes: N tokens of all examples, R examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from data.image_format import ImageFormat
from data.images import RowImages, join_row_images
from data.row_reasons import RowReason

IGNORE = -100  # the target of a position that is not learned, as in torch's cross-entropy


@dataclass(frozen=True)
class MixedSet:
    """A set of a mixture.

    Attributes:
        name: as the user names it, without its weight.
        size: number of its examples, which follow those of the set before it.
        per_epoch: number of its examples in an epoch, fewer or more than its size.
    """

    name: str
    size: int
    per_epoch: int


@dataclass(frozen=True)
class TokenizedRows:
    """All examples of a data set, or of the sets of a mixture, one after the other.

    Attributes:
        tokens: [N] int32.
        learned: [N] bool; whether the token is a target.
        starts: [R + 1] int64; example i is tokens[starts[i]:starts[i+1]].
        drop_reasons: why rows without a target are left out.
        cut_reasons: what kept rows lost to context_length.
        row_numbers: [R] int64; the number, from 1, of each example's row in its data set.
        sets: the sets of a mixture; () = there is one set, all of whose examples come once per epoch.
        images: the images of the examples.
        image_format: how the model takes them; None if no example has one.
    """

    tokens: torch.Tensor
    learned: torch.Tensor
    starts: torch.Tensor
    drop_reasons: tuple[RowReason, ...]
    cut_reasons: tuple[RowReason, ...]
    row_numbers: torch.Tensor
    sets: tuple[MixedSet, ...] = ()
    images: RowImages = field(default_factory=RowImages)
    image_format: ImageFormat | None = None

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

    @property
    def image_id(self) -> int:
        """The id of the token that stands for a part of an image; -1 if no example has an image."""
        return -1 if self.image_format is None else self.image_format.token_id

    def count_image_tokens(self) -> int:
        """Return the number of tokens that are parts of images."""
        return int((self.tokens == self.image_id).sum()) if self.images.refs else 0

    def largest_id(self) -> int:
        """Return the largest token id, but for that of parts of images, which has no embedding."""
        return int(self.tokens[self.tokens != self.image_id].max())

    def targets(self) -> torch.Tensor:
        """Return the number of targets of each example: [R]. Its first token is never one."""
        sums = self.learned.cumsum(0, dtype=torch.int64)  # 8 bytes per token of the data set, for a moment
        return sums[self.starts[1:] - 1] - sums[self.starts[:-1]]

    def image_counts(self) -> torch.Tensor:
        """Return the number of images of each example: [R] int64."""
        return self.images.starts.diff() if self.images.refs else torch.zeros(len(self), dtype=torch.int64)

    def row_name(self, index: int) -> int | str:
        """Return the number of an example's row in its data set; of a mixture a text with the set's name."""
        number, name = int(self.row_numbers[index]), self.set_name(index)
        return f"{number} of {name}" if name else number

    def set_name(self, index: int) -> str:
        """Return the name of an example's set of a mixture; "" if there is one set."""
        ends = accumulate(each.size for each in self.sets)
        return next((each.name for each, end in zip(self.sets, ends, strict=True) if index < end), "")


def join_sets(parts: Sequence[TokenizedRows], sets: Sequence[MixedSet]) -> TokenizedRows:
    """Return the examples of the sets of a mixture, one set after the other. sets: what they are there."""
    lengths = torch.cat([rows.lengths() for rows in parts])
    named = [(rows, each.name) for rows, each in zip(parts, sets, strict=True)]
    return TokenizedRows(
        torch.cat([rows.tokens for rows in parts]),
        torch.cat([rows.learned for rows in parts]),
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        tuple(each.of_set(name) for rows, name in named for each in rows.drop_reasons),
        tuple(each.of_set(name) for rows, name in named for each in rows.cut_reasons),
        torch.cat([rows.row_numbers for rows in parts]),
        tuple(sets),
        join_row_images([(rows.images, len(rows)) for rows in parts]),
        next((rows.image_format for rows in parts if rows.image_format), None),
    )


def digest_rows(rows: TokenizedRows) -> str:
    """Return the SHA-256 hex digest of the rows' `tokens`, `learned` and `starts`, in order.

    That of a mixture also depends on the sizes of its sets and their rows per epoch, and that of rows with
    images on the digest of each image.
    """
    digest = hashlib.sha256()
    for tensor in (rows.tokens, rows.learned, rows.starts):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    for each in rows.sets:
        digest.update(f"{each.size} {each.per_epoch};".encode())
    if rows.images.refs:
        digest.update(rows.images.starts.contiguous().view(torch.uint8).numpy().data)
        for ref in rows.images.refs:
            digest.update(ref.digest)
    return digest.hexdigest()
