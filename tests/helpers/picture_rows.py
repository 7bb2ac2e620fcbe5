"""Tokenized rows with images, made by hand: small files of random pixels between distinct tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from data.image_format import ImageFormat
from data.images import ImageRef, RowImages
from data.rows import TokenizedRows
from training import preflight

FIRST_TEXT = 1000  # tokens of text are above it, and each comes once


def write_pictures(
    folder: Path, count: int, sizes: Sequence[tuple[int, int]] | None = None
) -> list[ImageRef]:
    """Write pictures, and return references to them. sizes: (width, height) of each; None: different ones."""
    generator, refs = np.random.default_rng(count), []
    for i in range(count):
        width, height = sizes[i] if sizes else (int(n) for n in generator.integers(20, 90, 2))
        path = folder / f"{i}.png"
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        refs.append(ImageRef(str(path), 0, None, width, height, f"rows.jsonl, row {i + 1}"))
    return refs


def make_picture_rows(refs: list[ImageRef], counts: list[int], image_format: ImageFormat) -> TokenizedRows:
    """Return rows with so many images each, `refs` in turn. All text is learned.

    A row begins with one token of text, and has 2 to 9 after each image, or after its first token.
    """
    generator, left = torch.Generator().manual_seed(len(counts)), iter(refs)
    rows, used, next_token = [], [], FIRST_TEXT
    for count in counts:
        row = [torch.tensor([next_token])]
        next_token += 1
        for i in range(max(count, 1)):
            if count:
                used.append(next(left))
                tokens = image_format.count_tokens(used[-1].width, used[-1].height)
                row.append(torch.full((tokens,), image_format.token_id))
            length = int(torch.randint(2, 10, (), generator=generator)) + i
            row.append(torch.arange(next_token, next_token + length))
            next_token += length
        rows.append(torch.cat(row).int())
    tokens, lengths = torch.cat(rows), torch.tensor([0, *map(len, rows)])
    starts = torch.tensor([0, *counts]).cumsum(0)
    return TokenizedRows(
        tokens,
        tokens != image_format.token_id,
        lengths.cumsum(0),
        (),
        (),
        torch.arange(1, len(counts) + 1),
        images=RowImages(used, starts) if used else RowImages(),
        image_format=image_format if used else None,
    )


@contextlib.contextmanager
def rows_replaced(change: Callable[[TokenizedRows], TokenizedRows]) -> Iterator[None]:
    """Let the checks before a run replace the rows of its data by change(rows)."""
    original = preflight.prepare_sets

    def prepare(*args, **options):
        config, rows, evaluation = original(*args, **options)
        return config, change(rows), evaluation

    with mock.patch.object(preflight, "prepare_sets", prepare):
        yield
