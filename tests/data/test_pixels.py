"""Pixels equal those of transformers' processors, and what cannot be read is refused with the row's name."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from data.pixels import PUT_BACK, read_pixels, without_remedies
from models.image_settings import read_fixed_images, read_patch_images
from options.errors import UserError
from tests.helpers.image_folders import write_gemma_folder, write_qwen_folder
from tests.helpers.pictures import KINDS, ORIENTATION, TRANSPARENT, draw, save_picture

# transformers 5.17 drops transparency, and shows the colours behind it.
KEEPS_TRANSPARENCY = "return_numpy" in inspect.signature(convert_to_rgb).parameters


def reference_picture(kind: str, path: str) -> Image.Image:
    """Return what users give to a processor: of load_image or, as that cuts transparency, of `datasets`."""
    if kind not in TRANSPARENT:
        return load_image(path)
    if not KEEPS_TRANSPARENCY:
        pytest.skip("this version of transformers drops transparency")
    with Image.open(path) as opened:
        return ImageOps.exif_transpose(opened)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Return (how a tiny Gemma 3 takes images, its processor)."""
    folder = tmp_path_factory.mktemp("gemma")
    config, processor = write_gemma_folder(folder)
    return read_fixed_images(config, folder), processor


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Return (how a tiny Qwen3-VL takes images, its image processor)."""
    folder = tmp_path_factory.mktemp("qwen")
    config, processor = write_qwen_folder(folder)
    return read_patch_images(config, folder), processor


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_one_size_equal_the_processors(kind, gemma, tmp_path):
    (image_format, processor), ref = gemma, save_picture(kind, tmp_path)
    pixels = image_format.arrange([read_pixels(ref, image_format)])
    assert pixels.values.dtype == torch.uint8 and pixels.grids == ()
    picture = reference_picture(kind, ref.path)
    expected = processor(text="<start_of_image>", images=[[picture]], return_tensors="pt")
    made = image_format.normalise(pixels.values, torch.float32)
    torch.testing.assert_close(made, expected["pixel_values"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_patches_equal_the_processors(kind, qwen, tmp_path):
    (image_format, processor), ref = qwen, save_picture(kind, tmp_path)
    picture = reference_picture(kind, ref.path)
    if kind == "long":
        with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
            processor([picture])
        refusal = "10000 x 30 pixels; this model takes images up to 200 times as long as wide"
        assert image_format.refuse(10_000, 30) == refusal
        for use in (image_format.expand, image_format.count_tokens):
            with pytest.raises(UserError, match=f"an image of {refusal}"):
                use(10_000, 30)
        return
    assert not image_format.refuse(ref.width, ref.height)
    other = replace(ref, path=str(shutil.copy(ref.path, tmp_path / "copy")))
    pixels = image_format.arrange([read_pixels(each, image_format) for each in (ref, other)])
    expected = processor([picture, picture], return_tensors="pt")
    assert [[1, *grid] for grid in pixels.grids] == expected["image_grid_thw"].tolist()
    made = image_format.normalise(pixels.values, torch.float32)
    torch.testing.assert_close(made, expected["pixel_values"], rtol=0, atol=0)
    tokens = int(expected["image_grid_thw"][0].prod()) // 4
    assert image_format.count_tokens(ref.width, ref.height) == tokens
    assert image_format.expand(ref.width, ref.height).count("<|image_pad|>") == tokens


def test_sizes_equal_the_processors(qwen):
    """Also where rounding decides."""
    image_format, processor = qwen
    generator = torch.Generator().manual_seed(0)
    for width, height in (2 ** (torch.rand(300, 2, generator=generator) * 11)).int().tolist():
        if image_format.refuse(width, height):
            continue
        bounds = {"min_pixels": 2_000, "max_pixels": 40_000}
        patches = processor.get_number_of_image_patches(height, width, bounds)
        assert image_format.count_tokens(width, height) == patches // 4, (width, height)


# {--image_size: {(width, height): the size for the tower}}; patches of 16 pixels, 2,000 to 40,000 pixels
LIMITED = {
    64: {(1000, 20): (64, 16), (20, 1000): (16, 64), (200, 200): (64, 64), (300, 200): (64, 48)},
    79: {(1000, 20): (64, 16), (200, 200): (64, 64)},
    160: {(1000, 20): (160, 16), (400, 300): (160, 128), (100, 60): (96, 64)},
    1000: {(1000, 20): None, (4000, 3000): None, (100, 60): None, (3, 2): None},
}  # fmt: skip


@pytest.mark.parametrize("side", LIMITED)
def test_the_longest_side(qwen, side):
    """--image_size only makes images smaller; None = as without it."""
    whole = qwen[0]
    limited = whole.limit_side(side)
    for size, expected in LIMITED[side].items():
        assert limited.choose_size(*size) == (expected or whole.choose_size(*size)), size
        width, height = limited.choose_size(*size)
        assert limited.resize(draw("RGB", size)).shape == (3, height, width)
        assert limited.count_tokens(*size) == width * height // 256
    generator = torch.Generator().manual_seed(0)
    for width, height in (2 ** (torch.rand(300, 2, generator=generator) * 11)).int().tolist():
        if not whole.refuse(width, height):
            sides, most = limited.choose_size(width, height), whole.choose_size(width, height)
            assert max(sides) <= side and all(new <= old for new, old in zip(sides, most, strict=True))


def test_bytes_within_a_file(gemma, tmp_path):
    image_format, ref = gemma[0], save_picture("jpeg", tmp_path)
    encoded = (tmp_path / "jpeg.jpg").read_bytes()
    (tmp_path / "spool").write_bytes(b"before" + encoded + b"after")
    within = replace(ref, path=str(tmp_path / "spool"), start=6, size=len(encoded))
    torch.testing.assert_close(read_pixels(within, image_format), read_pixels(ref, image_format))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-300])


def damage(path):
    encoded = bytearray(path.read_bytes())
    encoded[60:120] = bytes(60)
    path.write_bytes(bytes(encoded))


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_large(path):
    """Only the header is there: the line about the size shows that nothing was decoded."""
    Image.new("1", (9000, 9000)).save(path)
    path.write_bytes(path.read_bytes()[:100])


def replace_by_turned(path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    draw("RGB", (61, 43)).save(path, exif=exif)


CHANGES = {
    "is truncated": (truncate, "truncated"),
    "is damaged": (damage, ""),
    "is gone": (lambda path: path.unlink(), "No such file"),
    "is a folder": (replace_by_folder, "is not a file"),
    "is text": (lambda path: path.write_text("no image"), "is not an image"),
    "is empty": (lambda path: path.write_bytes(b""), "is not an image"),
    "is turned": (replace_by_turned, "has 43 x 61 pixels, and had 61 x 43 when the run started"),
    "is large": (replace_by_large, "has 9000 x 9000 pixels, and had 61 x 43 when the run started"),
    "runs a program": (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n"), "is not an image"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_read_names_its_row(change, gemma, tmp_path):
    ref, (spoil, reason) = save_picture("rgb", tmp_path), CHANGES[change]
    spoil(tmp_path / "rgb.png")
    with pytest.raises(UserError) as caught:
        read_pixels(ref, gemma[0])
    line = str(caught.value)
    assert (
        line.startswith(f"--dataset rows.jsonl, row 3: image {ref.path}: cannot be read (") and reason in line
    )
    assert "\n" not in line and line.endswith(PUT_BACK)
    with pytest.raises(UserError) as caught, without_remedies():  # as generate.py, which trains nothing
        read_pixels(ref, gemma[0])
    assert str(caught.value) == line.removesuffix(PUT_BACK)
