"""Pixels on a GPU: the same values as on the host, and no wait."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from data.batches import StepSampler
from data.image_sizes import FixedImages, PatchImages
from data.prefetch import PrefetchedSteps
from launch.memory import try_page_locking
from tests.helpers.picture_rows import make_picture_rows, write_pictures

MEAN_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
FIXED = FixedImages("<i>", 7, (), *MEAN_STD, text="", n_tokens=4, side=28, resample=2)
PATCHES = PatchImages("<i>", 7, (), *MEAN_STD, ("", "<p>", ""), patch=7, merge=2, frames=2, min_pixels=400,
                      max_pixels=2_000, resample=3)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("image_format", [FIXED, PATCHES], ids=["fixed", "patches"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_pixels_equal_those_of_the_host(dtype, image_format):
    values = torch.arange(256, dtype=torch.uint8).repeat(3 * 7 * 7)[: 256 * 3 * 49].view(-1, 3, 7, 7)
    on_gpu = values.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = image_format.normalise(on_gpu, dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(made.cpu(), image_format.normalise(values, dtype), rtol=0, atol=0)


@pytest.mark.gpu
def test_images_come_in_pinned_memory(tmp_path):
    with try_page_locking([2**20]) as allowed:
        pass
    if not allowed:
        pytest.skip("this system grants no page-locked memory")
    rows = make_picture_rows(write_pictures(tmp_path, 6), [2, 1, 0, 3], FIXED)
    device = torch.device("cuda", 0)
    (step,) = PrefetchedSteps(StepSampler(rows, 4, 1, 0, 1, 42).steps(1), device, True, 2)
    (batch,) = step.batches
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = batch.to(device).images
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for field in dataclasses.fields(moved):
        tensor = getattr(batch.images, field.name)
        if isinstance(tensor, torch.Tensor):
            assert tensor.is_pinned()
            assert torch.equal(getattr(moved, field.name).cpu(), tensor)
