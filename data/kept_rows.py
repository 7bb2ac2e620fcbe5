"""Keep the tokenized rows that have something to learn from, cut to the context, and count the others.

Shapes: L tokens of one example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from data.formats import Rendered
from data.image_format import ImageFormat
from data.images import ImageRef, RowImages
from data.row_reasons import (
    CUT_ANSWER,
    CUT_IMAGE,
    CUT_REST,
    FIRST_TOKEN,
    LONG_IMAGES,
    LONG_PROMPT,
    NO_ANSWER,
    ReasonCounter,
    name_set,
)
from data.rows import TokenizedRows


class KeptRows:
    """The rows that have something to learn from, cut to context_length tokens, or before an image.

    Rows that are dropped or cut are counted by reason.

    Args:
        context_length: maximum number of tokens of a row.
        image_format: how the model takes images; None = it takes none.
    """

    def __init__(self, context_length: int, image_format: ImageFormat | None):
        self.context_length, self.image_format = context_length, image_format
        self.tokens, self.prompt_lengths = list[np.ndarray](), list[int]()
        self._learned, self._numbers = list[np.ndarray](), list[int]()
        self._images = list[Sequence[ImageRef]]()
        self._drops, self._cuts = ReasonCounter(), ReasonCounter()

    def add(
        self, example: Rendered, row: np.ndarray, targets: np.ndarray, spans: Sequence[tuple[int, int]]
    ) -> None:
        """Keep a row, or count why it is dropped.

        Args:
            example: the row as text.
            row: [L] int32, its tokens.
            targets: [L] bool, whether each is a target.
            spans: the tokens of its images, from the first one's begin to its end.
        """
        length = next(
            (first for first, end in spans if first < self.context_length < end), self.context_length
        )
        if targets.any():
            self.prompt_lengths.append(int(targets.argmax()))
        if not targets[1:length].any():
            reason = _drop_reason(targets, length, self.context_length)
            self._drops.add(name_set(reason, example.set_name), example.row_number)
            return
        self.tokens.append(row[:length])
        self._learned.append(targets[:length])
        self._numbers.append(example.row_number)
        self._images.append(
            [ref for ref, span in zip(example.images, spans, strict=True) if span[1] <= length]
        )
        if len(row) > length:
            reason = CUT_ANSWER if targets[length:].any() else CUT_REST
            reason = CUT_IMAGE if length < self.context_length else reason
            self._cuts.add(name_set(reason, example.set_name), example.row_number)

    def join(self) -> TokenizedRows:
        """Return the rows in flat tensors. There must be one."""
        starts = np.concatenate([[0], np.cumsum([len(row) for row in self.tokens])])
        tokens, learned = (torch.from_numpy(np.concatenate(a)) for a in (self.tokens, self._learned))
        reasons = self._drops.reasons(), self._cuts.reasons()
        images, numbers = RowImages.from_rows(self._images), torch.tensor(self._numbers)
        rows = TokenizedRows(tokens, learned, torch.from_numpy(starts), *reasons, numbers, images=images)
        return dataclasses.replace(rows, image_format=self.image_format) if images.refs else rows


def _drop_reason(targets: np.ndarray, length: int, context_length: int) -> str:
    """Return why a row has no target within its first `length` tokens.

    targets: [L] bool. A length below context_length is that of a row which is cut before an image.
    """
    if not targets.any():
        return NO_ANSWER
    if targets.argmax() < length:
        return FIRST_TOKEN
    return LONG_PROMPT if length == context_length else LONG_IMAGES
