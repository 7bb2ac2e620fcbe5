"""Rows with images for the tiny Gemma 3 (`gemma3_wrapper`): batches, and the same rows for transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from data.batches import Batch, make_batch
from data.image_batches import ImageBatch
from data.image_sizes import FixedImages
from data.images import ImageRef, RowImages
from data.packing import make_packed_batch
from data.rows import IGNORE, TokenizedRows
from tests.helpers.picture_rows import rows_replaced
from tests.helpers.runs import train_run

# Options of runs.
IMAGES, TOWER, PACKED = ["--images", "true"], ["--vision_targets", "all"], ["--vision_bits", "4"]
SIDE, TOKENS, IMAGE = (
    16,
    4,
    299,
)  # pixels of a side, tokens of an image and their id, as tests/helpers/tiny.py
# Tokens before, between and after the images of each row; the windows have 16 tokens.
TEXTS = [(3, 25), (2, 4, 9), (20,), (14, 12), (0, 1, 1, 30)]
LENGTHS = [sum(texts) + TOKENS * (len(texts) - 1) for texts in TEXTS]
COUNTS = [len(texts) - 1 for texts in TEXTS]
ROWS = list(range(len(TEXTS)))
FIRSTS = [sum(COUNTS[:row]) for row in range(len(TEXTS) + 1)]  # of the images of each row among all


FORMAT = FixedImages(
    *("<image>", IMAGE, (), (0.5, 0.4, 0.6), (0.5, 0.25, 0.4)),
    text="",
    n_tokens=TOKENS,
    side=SIDE,
    resample=2,
)


def pixels() -> torch.Tensor:
    """Return the pixels of the images of all rows, [I, 3, SIDE, SIDE] uint8."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (FIRSTS[-1], 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def image_rows() -> TokenizedRows:
    """Return rows of TEXTS random tokens with images between them. All but the images is learned."""
    generator, rows = torch.Generator().manual_seed(6), []
    for first, *others in TEXTS:
        row = [torch.randint(0, 256, (first,), generator=generator)]
        for count in others:
            row += [torch.full((TOKENS,), IMAGE), torch.randint(0, 256, (count,), generator=generator)]
        rows.append(torch.cat(row).int())
    tokens, starts = torch.cat(rows), torch.tensor([0, *LENGTHS]).cumsum(0)
    return TokenizedRows(tokens, tokens != IMAGE, starts, (), (), torch.arange(1, len(starts)))


@dataclass(frozen=True)
class ImageRows:
    """A batch of rows, with its images; None if it has none."""

    batch: Batch
    images: ImageBatch | None

    def inputs(self) -> dict:
        """Return the arguments of a model's forward with which it returns the loss."""
        learned = {"targets": self.batch.targets, "target_positions": self.batch.target_positions}
        return self.batch.model_inputs() | learned | ({"images": self.images} if self.images else {})


def padded(rows: list[int], length: int = max(LENGTHS), blank: bool = False) -> ImageRows:
    """Return rows of `image_rows`, padded. blank: with a blank image if they have none."""
    batch = make_batch(image_rows(), torch.tensor(rows), (len(rows), length), len(rows) * length)
    return ImageRows(batch, _image_batch(batch, rows, blank))


def packed(packs: list[list[int]]) -> ImageRows:
    """Return rows of `image_rows`, packed."""
    shape = len(packs), max(sum(LENGTHS[row] for row in pack) for pack in packs)
    indices = [torch.tensor(pack) for pack in packs]
    batch = make_packed_batch(image_rows(), indices, shape, max(LENGTHS), sum(map(len, packs)) + 2)
    return ImageRows(batch, _image_batch(batch, [row for pack in packs for row in pack], False))


def _image_batch(batch: Batch, rows: list[int], blank: bool) -> ImageBatch | None:
    positions = (batch.ids.flatten() == IMAGE).nonzero().flatten()
    if not len(positions) and not blank:
        return None
    owners = torch.zeros(batch.ids.numel(), dtype=torch.int32)
    owners[positions] = torch.arange(len(positions), dtype=torch.int32) // TOKENS + 1
    values = torch.cat([pixels()[FIRSTS[row] : FIRSTS[row + 1]] for row in rows])
    values = values if len(values) else FORMAT.blank()[None]
    starts = torch.arange(0, batch.ids.numel(), batch.ids.shape[1]) if batch.bounds is None else batch.bounds
    bounds = [
        (int(starts[torch.searchsorted(starts, first, right=True) - 1]), int(first), int(first) + TOKENS)
        for first in positions[::TOKENS]
    ]
    return ImageBatch(FORMAT, values, (), positions, owners.view(batch.ids.shape), tuple(bounds))


def row_of_transformers(row: int) -> dict:
    """Return a row as arguments of transformers' own forward."""
    rows = image_rows()
    ids = rows.tokens[rows.starts[row] : rows.starts[row + 1]].long()[None]
    values = pixels()[FIRSTS[row] : FIRSTS[row + 1]].float() / 255
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (FORMAT.mean, FORMAT.std))
    found = {"pixel_values": (values - mean) / std} if len(values) else {}
    return found | {"input_ids": ids, "token_type_ids": (ids == IMAGE).long()}


def loss_of_transformers(model, row: int) -> torch.Tensor:
    """Return the summed loss of a row, of transformers' model or of PEFT's."""
    inputs = row_of_transformers(row)
    targets = inputs["input_ids"][0, 1:]
    logits = model(**inputs).logits[0, :-1]
    return F.cross_entropy(
        logits, targets.masked_fill(targets == IMAGE, IGNORE), ignore_index=IGNORE, reduction="sum"
    )


def train_on_images(rank_info, argv: list[str], refs: list[ImageRef]):
    """Train on the rows of `image_rows`, with these images; return what `train_run` returns."""
    images = RowImages(refs, torch.tensor(FIRSTS))
    with rows_replaced(lambda _: replace(image_rows(), images=images, image_format=FORMAT)):
        return train_run(rank_info, [*argv, *IMAGES])
