"""Replace the placeholders of images in a text by the texts that stand for their tokens, and find these."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import accumulate

import numpy as np

from data.encoding import Offsets
from data.formats import Rendered
from data.image_format import ImageFormat
from options.errors import UserError


def check_placeholders(text: str, count: int, image_format: ImageFormat, error_prefix: str) -> None:
    """Raise UserError unless a rendered text has a placeholder for each image, and no other token of images.

    The columns of a row may be harmless alone, and write a token of images where a template joins them.

    Args:
        text: before `expand_images`.
        count: number of its images.
        image_format: how the model takes images.
        error_prefix: begins the error, and names the row.
    """
    pieces = text.split(image_format.placeholder)
    reserved = [token for token in image_format.reserved if any(token in piece for piece in pieces)]
    if len(pieces) - 1 > count:
        reserved.append(image_format.placeholder)
    if reserved:
        raise UserError(
            f"{error_prefix}: its text, as it is rendered, holds {reserved[0]}, which stands for an image;"
            " leave it out, and give images as parts or in a column images (docs/data.md)"
        )
    if len(pieces) - 1 < count:
        raise UserError(
            f"{error_prefix}: the chat template shows {len(pieces) - 1} of its {count} images as"
            f" {image_format.placeholder}; --chat_template takes another one"
        )


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


def check_image_tokens(
    ids: list[int], spans: Sequence[tuple[int, int]], image_ids: Collection[int], error_prefix: str
) -> None:
    """Raise UserError if a token of images is outside of the images, since it could be learned.

    The text has none there, so the tokenizer has made it of other characters.

    Args:
        ids: of an example's tokens.
        spans: from `locate_images`.
        image_ids: of the tokens of images.
        error_prefix: begins the error, and names the row.
    """
    outside = np.isin(np.array(ids), [*image_ids])
    for first, end in spans:
        outside[first:end] = False
    if outside.any():
        raise UserError(
            f"{error_prefix}: the tokenizer makes the id {ids[int(outside.argmax())]} of its text, which"
            " stands for an image; leave that out"
        )


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
