"""The rows on which export.py compares a written model with the trained one.

Shapes: B rows, T tokens of the longest.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data.dataset_names import first_set
from data.image_batches import ImageBatch, plan_prompt_images
from data.image_format import ImageFormat
from data.images import ImageRef
from data.prefetch import decode_images
from data.reading import ReadingOptions
from data.rows import TokenizedRows
from data.sources import find_recipe
from data.tokenizing import tokenize_dataset
from options.config import Config
from options.errors import UserError

FIXED_PROMPTS = (
    "The capital of France is",
    "Below is an instruction that describes a task. Write a response that completes it.",
    "def fibonacci(n):",
    "In 1969, two people walked on the moon.",
)
ROWS, WITH_IMAGES = 4, 2  # rows, and how many of these may have images
TOKENS = 256  # of a row without images, at most
CANDIDATES = 64  # first rows of data with images, of which the shortest are taken
LAST = 64  # compared tokens of each row, its last ones, if rows have more than TOKENS: logits are large


@dataclass(frozen=True)
class ComparisonRows:
    """Rows to compare logits on.

    Attributes:
        ids: [B, T] int64, padded on the right: causal attention never reads the padding.
        images: those of the rows; None = they have none.
        positions: [P] int64; those of the T tokens whose logits are compared.
        lengths: tokens of each row.
        description: what they are, for a line.
    """

    ids: torch.Tensor
    images: ImageBatch | None
    positions: torch.Tensor
    lengths: list[int]
    description: str


def read_comparison_rows(config: Config, tokenizer, image_format: ImageFormat | None) -> ComparisonRows:
    """Return a few rows of a run's data with their images if the data is local, else FIXED_PROMPTS.

    Args:
        config: the run's options.
        tokenizer: that of its training.
        image_format: how its model takes images; None = it takes none.
    """
    with contextlib.suppress(UserError):  # the data was moved or changed since the run
        name = first_set(config.dataset)
        recipe, file = find_recipe(name)
        if file or recipe.fill:
            reading = ReadingOptions.from_config(config, tokenizer, image_format)
            count, length = ROWS, min(config.context_length, TOKENS)
            if image_format:
                count, length = CANDIDATES, config.context_length
            reading = dataclasses.replace(reading, samples=count, context_length=length)
            chosen = _choose_rows(tokenize_dataset(name, reading))
            return _make_rows(chosen, "rows of the data", image_format)
    prompts = [(ids, ()) for ids in tokenizer(list(FIXED_PROMPTS))["input_ids"] if ids]
    return _make_rows(prompts, "fixed prompts without images" if image_format else "fixed prompts")


def _choose_rows(rows: TokenizedRows) -> list[tuple[list[int], Sequence[ImageRef]]]:
    """Return (token ids, images) of the shortest rows with images, and of the first without."""
    counts, lengths = rows.image_counts().tolist(), rows.lengths().tolist()
    shown = sorted((i for i, count in enumerate(counts) if count), key=lambda i: lengths[i])[:WITH_IMAGES]
    others = [i for i, count in enumerate(counts) if not count][: ROWS - len(shown)]
    texts = rows.tokens.split(lengths)
    return [(texts[i].tolist(), rows.images.of_row(i)) for i in shown] + [
        (texts[i][:TOKENS].tolist(), ()) for i in others
    ]


def _make_rows(
    prompts: Sequence[tuple[list[int], Sequence[ImageRef]]],
    description: str,
    image_format: ImageFormat | None = None,
) -> ComparisonRows:
    """Return rows, each (token ids, images), as a batch. Raises UserError for an image that is unreadable."""
    lengths = [len(ids) for ids, _ in prompts]
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, (tokens, _) in zip(ids, prompts, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    planned, images = plan_prompt_images(prompts, max(lengths), image_format), None
    if planned is not None:
        description += f" with {len(planned.refs)} images"
        images = decode_images(planned)
    return ComparisonRows(ids, images, _choose_positions(lengths), lengths, description)


def _choose_positions(lengths: list[int]) -> torch.Tensor:
    """Return the positions, of all T, whose logits are compared."""
    if max(lengths) <= TOKENS:
        return torch.arange(max(lengths))
    return torch.cat([torch.arange(max(n - LAST, 0), n) for n in lengths]).unique()
