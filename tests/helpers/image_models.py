"""Rows with images for tiny models that take them: batches, and the same rows for transformers.

GEMMA's images have one size. Those of Qwen-VL have several, and so have different numbers of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from data.batches import Batch, make_batch
from data.image_batches import ImageBatch
from data.image_format import ImageFormat
from data.image_sizes import FixedImages, PatchImages
from data.images import ImageRef, RowImages
from data.packing import make_packed_batch
from data.rows import IGNORE, TokenizedRows
from options.methods import METHODS
from tests.helpers.picture_rows import rows_replaced
from tests.helpers.runs import train_run

# Options of runs.
IMAGES, TOWER, PACKED = ["--images", "true"], ["--vision_targets", "all"], ["--vision_bits", "4"]
PROJECTOR = ["--vision_targets", "projector"]
IMAGE = 299  # id of an image's token, as in tests/helpers/tiny.py
# Tokens before, between and after the images of each row; the windows have 16 tokens.
TEXTS = [(3, 25), (2, 4, 9), (20,), (14, 12), (0, 1, 1, 30)]
COUNTS = [len(texts) - 1 for texts in TEXTS]
ROWS = list(range(len(TEXTS)))
FIRSTS = [sum(COUNTS[:row]) for row in range(len(TEXTS) + 1)]  # of the images of each row among all
_START = ("<image>", IMAGE, (), (0.5, 0.4, 0.6), (0.5, 0.25, 0.4))  # of the formats


@dataclass(frozen=True)
class TinyModel:
    """A tiny model that takes images.

    Attributes:
        kind: its name among the checkpoints.
        format: how it takes images.
        sizes: (width, height) of the images of all rows.
        n_tower_linears: linears that --vision_targets all adapts.
        n_projector_linears: those that --vision_targets projector adapts.
        n_matrices: bare matrices of the projector, which both adapt, with LoRA alone.
    """

    kind: str
    format: ImageFormat
    sizes: tuple[tuple[int, int], ...]
    n_tower_linears: int
    n_projector_linears: int
    n_matrices: int = 0

    def n_adapted(self, options: list[str], train_type: str) -> int:
        """Return the number of modules of the vision parts that get adapters by --vision_targets."""
        if "--vision_targets" not in options:
            return 0
        linears = {"all": self.n_tower_linears, "projector": self.n_projector_linears}
        is_lora = METHODS[train_type].adapter == "lora"
        return linears[options[options.index("--vision_targets") + 1]] + self.n_matrices * is_lora

    def n_tokens(self, row: int) -> list[int]:
        """Return the number of tokens of each image of a row."""
        return [self.format.count_tokens(*size) for size in self.sizes[FIRSTS[row] : FIRSTS[row + 1]]]

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row."""
        return [sum(texts) + sum(self.n_tokens(row)) for row, texts in enumerate(TEXTS)]

    def pixels(self, row: int) -> list[torch.Tensor]:
        """Return the pixels of a row's images, each [3, height, width] uint8."""
        generator = torch.Generator().manual_seed(3)
        images = [
            torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
            for width, height in self.sizes
        ]
        return images[FIRSTS[row] : FIRSTS[row + 1]]


FORMAT = FixedImages(*_START, text="", n_tokens=4, side=16, resample=2)  # of Gemma 3
GEMMA = TinyModel(
    "gemma3_wrapper",
    FORMAT,
    sizes=((16, 16),) * FIRSTS[-1],
    n_tower_linears=2 * 6,
    n_projector_linears=0,
    n_matrices=1,
)
QWEN = TinyModel(
    "qwen3_vl",
    PatchImages(
        *_START,
        wrapped_token=("", "", ""),
        patch=4,
        merge=2,
        frames=2,
        min_pixels=8 * 8,
        max_pixels=32 * 32,
        resample=2,
    ),
    sizes=((16, 16), (24, 8), (16, 24), (8, 8), (32, 32), (8, 24), (16, 8)),
    n_tower_linears=3 * 4 + 3 * 2,
    n_projector_linears=3 * 2,
)
QWEN_2_5 = replace(QWEN, kind="qwen2_5_vl", n_tower_linears=3 * 5 + 2, n_projector_linears=2)
MODELS = {"gemma3": GEMMA, "qwen3_vl": QWEN, "qwen2_5_vl": QWEN_2_5}


def image_rows(of: TinyModel = GEMMA) -> TokenizedRows:
    """Return rows of TEXTS random tokens with images between them. All but the images is learned."""
    generator, rows = torch.Generator().manual_seed(6), []
    for number, (first, *others) in enumerate(TEXTS):
        row = [torch.randint(0, 256, (first,), generator=generator)]
        for tokens, count in zip(of.n_tokens(number), others, strict=True):
            row += [torch.full((tokens,), IMAGE), torch.randint(0, 256, (count,), generator=generator)]
        rows.append(torch.cat(row).int())
    tokens, starts = torch.cat(rows), torch.tensor([0, *of.lengths()]).cumsum(0)
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


def padded(rows: list[int], blank: bool = False, of: TinyModel = GEMMA) -> ImageRows:
    """Return rows of `image_rows`, padded. blank: with a blank image if they have none."""
    length = max(of.lengths())
    batch = make_batch(image_rows(of), torch.tensor(rows), (len(rows), length), len(rows) * length)
    return ImageRows(batch, _image_batch(batch, rows, blank, of))


def packed(packs: list[list[int]], of: TinyModel = GEMMA) -> ImageRows:
    """Return rows of `image_rows`, packed."""
    lengths = of.lengths()
    shape = len(packs), max(sum(lengths[row] for row in pack) for pack in packs)
    indices = [torch.tensor(pack) for pack in packs]
    batch = make_packed_batch(image_rows(of), indices, shape, max(lengths), sum(map(len, packs)) + 2)
    return ImageRows(batch, _image_batch(batch, [row for pack in packs for row in pack], False, of))


def _image_batch(batch: Batch, rows: list[int], blank: bool, of: TinyModel) -> ImageBatch | None:
    positions = (batch.ids.flatten() == IMAGE).nonzero().flatten()
    if not len(positions) and not blank:
        return None
    images = [image for row in rows for image in of.pixels(row)]
    counts = [count for row in rows for count in of.n_tokens(row)]
    owners = torch.zeros(batch.ids.numel(), dtype=torch.int32)
    owners[positions] = torch.arange(1, len(counts) + 1, dtype=torch.int32).repeat_interleave(
        torch.tensor(counts, dtype=torch.int64)
    )
    pixels = of.format.arrange(images or [of.format.blank()])
    starts = torch.arange(0, batch.ids.numel(), batch.ids.shape[1]) if batch.bounds is None else batch.bounds
    bounds = [
        (
            int(starts[torch.searchsorted(starts, of_one[0], right=True) - 1]),
            int(of_one[0]),
            int(of_one[-1]) + 1,
        )
        for of_one in positions.split(counts)
        if len(of_one)
    ]
    where = (positions, owners.view(batch.ids.shape), tuple(bounds))
    return ImageBatch(of.format, pixels.values, pixels.grids, *where)


def row_of_transformers(row: int, of: TinyModel = GEMMA) -> dict:
    """Return a row as arguments of transformers' own forward."""
    rows = image_rows(of)
    ids = rows.tokens[rows.starts[row] : rows.starts[row + 1]].long()[None]
    kinds = {f"{name}token_type_ids": (ids == IMAGE).long() for name in ([""] if of is GEMMA else ["mm_"])}
    if not COUNTS[row]:
        return kinds | {"input_ids": ids}
    pixels = of.format.arrange(of.pixels(row))
    values = of.format.normalise(pixels.values, torch.float32)
    grids = {"image_grid_thw": torch.tensor([(1, *grid) for grid in pixels.grids])} if pixels.grids else {}
    return kinds | grids | {"input_ids": ids, "pixel_values": values}


def loss_of_transformers(model, row: int, of: TinyModel = GEMMA) -> torch.Tensor:
    """Return the summed loss of a row, of transformers' model or of PEFT's."""
    inputs = row_of_transformers(row, of)
    targets = inputs["input_ids"][0, 1:]
    logits = model(**inputs).logits[0, :-1]
    return F.cross_entropy(
        logits, targets.masked_fill(targets == IMAGE, IGNORE), ignore_index=IGNORE, reduction="sum"
    )


def train_on_images(rank_info, argv: list[str], refs: list[ImageRef], of: TinyModel = GEMMA):
    """Train on the rows of `image_rows`, with these images; return what `train_run` returns."""
    images = RowImages(refs, torch.tensor(FIRSTS))
    with rows_replaced(lambda _: replace(image_rows(of), images=images, image_format=of.format)):
        return train_run(rank_info, [*argv, *IMAGES])
