"""Replace the placeholders of images in a text by the texts that stand for their tokens, and find these."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from itertools import accumulate

import numpy as np

from data.encoding import Offsets
from data.formats import Rendered
from data.image_format import ImageFormat
from options.errors import UserError


def expand_images(example: Rendered, image_format: ImageFormat | None) -> Rendered:
    """Return an example with the text of each image's tokens in the place of its placeholder.

    Learned ranges move with the text. The result is many times as long, so it is made for few examples at
    once.
    """
    if not example.images:
        return example
    assert image_format is not None
    pieces = example.text.split(image_format.placeholder)
    expansions = [image_format.expand(ref.width, ref.height) for ref in example.images]
    assert len(pieces) == len(expansions) + 1
    text, spans = pieces[0], list[tuple[int, int]]()
    for expansion, piece in zip(expansions, pieces[1:], strict=True):
        spans.append((len(text), len(text) + len(expansion)))
        text += expansion + piece
    # Where each placeholder ends in the old text, and by how much what follows it has moved.
    size = len(image_format.placeholder)
    ends = [end + size * i for i, end in enumerate(accumulate(map(len, pieces[:-1])), 1)]
    moves = [0, *accumulate(len(expansion) - size for expansion in expansions)]

    def move(index: int) -> int:
        """Return where a character of the old text is in the new one."""
        return index + moves[bisect_right(ends, index)]

    learned = [(move(start), move(end)) for start, end in example.learned]
    return dataclasses.replace(example, text=text, learned=learned, image_spans=spans)


def locate_images(
    example: Rendered, ids: list[int], offsets: Offsets, image_format: ImageFormat | None, context_length: int
) -> list[tuple[int, int]]:
    """Return the tokens [first, end) of each image of an example, those that frame it included.

    Args:
        example: from `expand_images`.
        ids, offsets: of its tokens, from `encode`.
        image_format: how the model takes images.
        context_length: the maximum number of tokens of a row.

    Raises UserError for an image that has more tokens than a row may have, and if the tokenizer does not
    write the tokens that the model expects.
    """
    if not example.image_spans:
        return []
    assert image_format is not None
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    is_part = np.array(ids) == image_format.token_id
    spans = list[tuple[int, int]]()
    for start, end in example.image_spans:
        # One token may have the line breaks behind an image and those before the next one.
        first = max(int(np.searchsorted(ends, start, "right")), spans[-1][1] if spans else 0)
        spans.append((first, int(np.searchsorted(starts, end, "left"))))
    for ref, (first, end) in zip(example.images, spans, strict=True):
        error_prefix = f"--dataset {ref.origin}: image {ref.label}"
        if end - first > context_length:
            raise UserError(
                f"{error_prefix} takes {end - first:,} tokens, more than --context_length {context_length:,};"
                " raise it"
            )
        count, expected = int(is_part[first:end].sum()), image_format.count_tokens(ref.width, ref.height)
        if count != expected:
            raise UserError(
                f"{error_prefix} has {count:,} tokens of images where the model takes {expected:,}: the"
                " tokenizer is not the model's"
            )
    return spans
