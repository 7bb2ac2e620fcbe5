from __future__ import annotations

import threading
import weakref
from dataclasses import replace

import pytest
import torch

from data.batches import Step, StepSampler
from data.image_sizes import FixedImages
from data.packing import PackSampler
from data.pixels import read_pixels
from data.prefetch import PrefetchedSteps
from options.errors import UserError
from tests.helpers.picture_rows import make_picture_rows, write_pictures
from tests.helpers.token_rows import make_token_rows

CPU = torch.device("cpu")
FIRST, SECOND = (Step(epoch, [], 0, 0, torch.zeros(0)) for epoch in (0.5, 1.0))


def test_the_same_steps_in_their_order():
    def steps():
        return StepSampler(make_token_rows(17), 2, 2, 0, 1, 42).steps(2)

    plain, early = list(steps()), list(PrefetchedSteps(steps(), CPU, pin=False))
    assert [s.epoch for s in early] == [s.epoch for s in plain]
    for a, b in zip(plain, early, strict=True):
        assert all(torch.equal(x.ids, y.ids) for x, y in zip(a.batches, b.batches, strict=True))


def test_a_step_is_made_while_the_one_before_is_in_use():
    second = threading.Event()

    def steps():
        yield FIRST
        second.set()
        yield SECOND

    early = PrefetchedSteps(steps(), CPU, pin=False)
    assert next(early).epoch == FIRST.epoch
    assert second.wait(timeout=30)
    assert [step.epoch for step in early] == [SECOND.epoch]


def test_an_error_comes_where_the_step_would():
    def steps():
        yield FIRST
        raise OSError("the disk is gone")

    early = PrefetchedSteps(steps(), CPU, pin=False)
    assert next(early).epoch == FIRST.epoch
    with pytest.raises(OSError, match="the disk is gone"):
        next(early)


def test_a_loop_that_ends_early_ends_the_thread():
    before = threading.active_count()
    early = PrefetchedSteps(StepSampler(make_token_rows(17), 2, 2, 0, 1, 42).steps(2), CPU, pin=False)
    next(early)
    assert threading.active_count() == before + 1
    early.close()
    assert threading.active_count() == before


def test_a_thread_that_makes_batches_and_fails_is_told():
    """In its turn: after the steps that it made, and not by waiting for ever."""

    def steps():
        yield from (FIRST, SECOND)
        raise OSError("the disk is gone")

    made = PrefetchedSteps(steps(), torch.device("cpu"), pin=False)
    assert [next(made).epoch, next(made).epoch] == [FIRST.epoch, SECOND.epoch]
    with pytest.raises(OSError, match="the disk is gone"):
        next(made)


def test_batches_stay_where_page_locking_is_refused(monkeypatch):
    asked = []

    def refuse(tensor):
        asked.append(tensor)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)

    def steps():
        return StepSampler(make_token_rows(17), 2, 2, 0, 1, 42).steps(2)

    for plain, made in zip(steps(), PrefetchedSteps(steps(), CPU, pin=True), strict=True):
        for a, b in zip(plain.batches, made.batches, strict=True):
            assert torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets)
    tensors_of_a_batch = 4
    assert len(asked) == tensors_of_a_batch * 2, "for the first step only, which has two batches"


FIXED = FixedImages("<i>", 7, (), (0.5,) * 3, (0.5,) * 3, text="", n_tokens=4, side=28, resample=2)
COUNTS = [1, 0, 2, 0, 0, 1, 3, 0, 1, 0, 2, 0, 1]  # images of each row


@pytest.fixture(scope="module")
def picture_rows(tmp_path_factory):
    refs = write_pictures(tmp_path_factory.mktemp("pictures"), sum(COUNTS))
    return make_picture_rows(refs, COUNTS, FIXED)


def picture_sampler(rows, packing, rank=0, world=1):
    sizes = (rows, 2, 2, rank, world, 42)
    return PackSampler(*sizes, 64, 3) if packing else StepSampler(*sizes)


@pytest.mark.parametrize("packing", [False, True])
def test_each_image_gets_its_pixels(packing, picture_rows):
    """On all ranks, blank ones included."""
    for rank in range(2):
        plain = picture_sampler(picture_rows, packing, rank, 2).steps(1)
        made = PrefetchedSteps(picture_sampler(picture_rows, packing, rank, 2).steps(1), CPU, False, 3)
        for step, with_pixels in zip(plain, made, strict=True):
            for batch, loaded in zip(step.batches, with_pixels.batches, strict=True):
                planned, images = batch.planned_images, loaded.images
                assert (planned is None) == (images is None) and loaded.planned_images is None
                if planned:
                    pixels = [read_pixels(ref, FIXED) for ref in planned.refs]
                    assert torch.equal(images.values, torch.stack(pixels or [FIXED.blank()]))
                    assert torch.equal(images.positions, planned.positions)
                    assert loaded.model_inputs()["images"] is images


@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_run_gets_the_same_images(packing, picture_rows):
    def steps(done: int) -> list[list]:
        made = PrefetchedSteps(picture_sampler(picture_rows, packing).steps(6, done), CPU, False, 2)
        return [[(b.ids, b.images and (b.images.values, b.images.bounds)) for b in s.batches] for s in made]

    whole = steps(0)
    assert len(whole) > 5
    for done in (1, len(whole) // 2):
        torch.testing.assert_close(steps(done), whole[done:], rtol=0, atol=0)


def test_pixels_of_two_steps_are_in_memory(picture_rows):
    """Those of the step in use and of the next one."""
    made, pixels = PrefetchedSteps(picture_sampler(picture_rows, False).steps(3), CPU, False, 2), []
    for step in made:
        assert made.next_error() is None
        pixels.append([weakref.ref(b.images.values) for b in step.batches if b.images])
        assert [i for i, refs in enumerate(pixels) if any(ref() is not None for ref in refs)] in (
            [len(pixels) - 1],
            [],
        )


def test_images_are_pinned_and_moved_with_their_batch(picture_rows, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    step = next(PrefetchedSteps(picture_sampler(picture_rows, False).steps(1), CPU, True, 2))
    batch = next(b for b in step.batches if b.images)
    names = ("values", "positions", "owners")
    assert all(any(torch.equal(getattr(batch.images, name), each) for each in pinned) for name in names)
    moved = batch.to(torch.device("meta")).images
    assert all(getattr(moved, name).is_meta for name in names) and moved.bounds == batch.images.bounds


def test_an_image_that_cannot_be_read_is_told_before_its_step(picture_rows, tmp_path):
    ref = replace(picture_rows.images.refs[3], path=str(tmp_path / "gone.png"))
    refs = [ref if i == 3 else each for i, each in enumerate(picture_rows.images.refs)]
    rows = replace(picture_rows, images=replace(picture_rows.images, refs=refs))
    spoiled = next(i for i in range(len(rows)) if ref in rows.images.of_row(i))
    made = PrefetchedSteps(picture_sampler(rows, False).steps(1), CPU, False, 2)
    before = [spoiled in step.rows for step in picture_sampler(rows, False).steps(1)].index(True)
    assert before, "there is a good step"
    for i in range(before):
        next(made)
        assert (made.next_error() is None) == (i + 1 < before)
    error = made.next_error()
    assert isinstance(error, UserError) and str(error).startswith("--dataset rows.jsonl, row 4: image")
    with pytest.raises(UserError, match=r"gone\.png"):
        next(made)
