"""The images of the fullest sequence of a run, for the model of memory and the trials before a run.

A vision tower takes memory by the pixels of the resized images (monitoring/vision_memory.py).

Shapes: T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.image_format import ImageFormat
from data.images import ImageRef
from data.rows import TokenizedRows
from options.config import Config


def fit_images(refs: Sequence[ImageRef], image_format: ImageFormat, tokens: int) -> tuple[ImageRef, ...]:
    """Return the first images of a row, as many as leave room for another token among so many.

    A row that is cut ends before an image that is not whole.
    """
    fitting: list[ImageRef] = []
    for ref in refs:
        tokens -= image_format.count_tokens(ref.width, ref.height)
        if tokens < 1:
            break
        fitting.append(ref)
    return tuple(fitting)


def sum_pixels(refs: Sequence[ImageRef], image_format: ImageFormat) -> int:
    """Return the pixels of images, resized as the model takes them."""
    return sum(image_format.count_pixels(ref.width, ref.height) for ref in refs)


def fullest_images(rows: TokenizedRows, tokens: int) -> tuple[ImageRef, ...]:
    """Return the images of the row that has most pixels, if rows are cut at `tokens`. () without images."""
    image_format = rows.image_format
    if image_format is None or not rows.images.refs:
        return ()
    showing = rows.image_counts().nonzero()[:, 0].tolist()
    by_row = (fit_images(rows.images.of_row(i), image_format, tokens) for i in showing)
    return max(by_row, key=lambda refs: sum_pixels(refs, image_format))


def max_sequence_pixels(config: Config, rows: TokenizedRows, tokens: int) -> int:
    """Return an upper limit of the pixels of the resized images of a sequence, which is a row or a pack.

    Args:
        config: the run's options: packing and images of a pack.
        rows: the training rows.
        tokens: T at most.
    """
    image_format, refs = rows.image_format, rows.images.refs
    if image_format is None or not refs:
        return 0
    of_row = sum_pixels(fullest_images(rows, tokens), image_format)
    if not config.packing:
        return of_row
    sizes = {(ref.width, ref.height) for ref in refs}
    pixels = {size: image_format.count_pixels(*size) for size in sizes}
    # As many images as a pack may have; and no more than its tokens are.
    limit = config.images_per_pack if config.images_per_pack > 0 else tokens
    by_tokens = tokens * max(n / max(image_format.count_tokens(*size), 1) for size, n in pixels.items())
    return max(of_row, min(limit * max(pixels.values()), int(by_tokens)))
