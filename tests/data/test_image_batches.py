"""The images of each micro-batch: where their tokens are, and which pixels they get."""

from __future__ import annotations

import pytest
import torch

from data.batches import StepSampler
from data.image_sizes import FixedImages, PatchImages
from data.packing import PackSampler
from tests.helpers.picture_rows import make_picture_rows, write_pictures

MEAN_STD = ((0.5, 0.4, 0.45), (0.5, 0.3, 0.25))
FIXED = FixedImages("<i>", 7, (), *MEAN_STD, text="", n_tokens=4, side=28, resample=2)
PATCHES = PatchImages("<i>", 7, (), *MEAN_STD, ("", "<p>", ""), patch=7, merge=2, frames=2, min_pixels=400,
                      max_pixels=2_000, resample=3)  # fmt: skip
COUNTS = [1, 0, 2, 0, 0, 0, 1, 3, 0, 0, 1, 0, 0, 2, *[0] * 30]  # images of each row


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), sum(COUNTS))


def samplers_of(rows, packing: bool, batch_size: int, accumulation: int, world: int) -> list[StepSampler]:
    """Return the sampler of each rank."""
    sizes = [(rows, batch_size, accumulation, rank, world, 42) for rank in range(world)]
    return [PackSampler(*each, 64, 3) if packing else StepSampler(*each) for each in sizes]


def expected_images(batch, rows) -> list[tuple[str, int, list[int]]]:
    """Return [(path, row_start, indices of the tokens)] of a batch's images, found token by token.

    The tokens of text tell which row they are of.
    """
    flat, found = batch.ids.flatten().tolist(), []
    for index in range(len(rows)):
        tokens = rows.tokens[rows.starts[index] : rows.starts[index + 1]].tolist()
        if tokens[0] not in flat:
            continue
        start = flat.index(tokens[0])
        assert flat[start : start + len(tokens)] == tokens
        at = [start + i for i, token in enumerate(tokens) if token == rows.image_format.token_id]
        for ref in rows.images.of_row(index):
            count = rows.image_format.count_tokens(ref.width, ref.height)
            found.append((ref.path, start, at[:count]))
            at = at[count:]
        assert not at
    return sorted(found, key=lambda image: image[2])


@pytest.mark.parametrize("image_format", [FIXED, PATCHES], ids=["fixed", "patches"])
@pytest.mark.parametrize("size", [(2, 1, 1), (1, 2, 2), (3, 1, 2), (1, 1, 4)])
@pytest.mark.parametrize("packing", [False, True])
def test_tokens_of_images_are_found(packing, size, image_format, refs):
    rows = make_picture_rows(refs, COUNTS, image_format)
    blank = nothing = 0
    for steps in zip(*(sampler.steps(2) for sampler in samplers_of(rows, packing, *size)), strict=True):
        seen = 0
        for batches in zip(*(step.batches for step in steps), strict=True):
            expected = [expected_images(batch, rows) for batch in batches]
            for batch, images in zip(batches, expected, strict=True):
                planned = batch.planned_images
                if not any(expected):
                    assert planned is None
                    nothing += 1
                    continue
                assert [ref.path for ref in planned.refs] == [path for path, _, _ in images]
                assert planned.positions.tolist() == [i for _, _, at in images for i in at]
                assert list(planned.bounds) == [(start, at[0], at[-1] + 1) for _, start, at in images]
                owners = torch.zeros(batch.ids.numel(), dtype=torch.int32)
                for number, (_, _, at) in enumerate(images, 1):
                    owners[at] = number
                assert torch.equal(planned.owners, owners.view(batch.ids.shape))
                pixels = planned.with_pixels([rows.image_format.blank()] * len(images))
                assert pixels.values.dtype == torch.uint8
                if image_format is PATCHES:
                    assert len(pixels.grids) == max(len(images), 1)
                else:
                    assert pixels.values.shape == (max(len(images), 1), 3, 28, 28)
                blank += not images
            seen += sum(map(len, expected))
        assert {step.n_images for step in steps} == {seen}
    assert size != (1, 1, 4) or blank, "a rank has no image, and another one has"
    assert size != (1, 2, 2) or nothing, "no rank has an image"


def test_rows_without_images_plan_none(refs):
    rows = make_picture_rows([], [0, 0, 0], FIXED)
    (step,) = StepSampler(rows, 3, 1, 0, 1, 42).steps(1)
    assert step.n_images == 0 and step.batches[0].planned_images is None
    assert "images" not in step.batches[0].model_inputs()
