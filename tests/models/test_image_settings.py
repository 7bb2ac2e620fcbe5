"""How images become tokens and pixels, read from the files of a model's folder."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from models.image_settings import read_fixed_images, read_patch_images
from options.errors import UserError
from tests.helpers.image_folders import QWEN_TOKENS, write_gemma_folder, write_qwen_folder
from tests.helpers.pictures import draw


@pytest.mark.parametrize("layout", [4, 5])
def test_texts_are_expanded_as_by_the_processor(layout, tmp_path):
    config, processor = write_gemma_folder(tmp_path, layout)
    image_format = read_fixed_images(config, tmp_path)
    text = f"See {image_format.placeholder} and {image_format.placeholder}."
    pictures = [draw("RGB", (5, 9)), draw("RGB", (8, 2))]
    expected = processor(text=text, images=[pictures], return_tensors="pt")
    expanded = text.replace(image_format.placeholder, image_format.expand(5, 9))
    ids = AutoTokenizer.from_pretrained(tmp_path)(expanded)["input_ids"]
    assert ids == expected["input_ids"][0].tolist()
    assert ids.count(image_format.token_id) == 2 * image_format.count_tokens(5, 9) == 8
    pixels = image_format.arrange([image_format.resize(picture) for picture in pictures])
    made = image_format.normalise(pixels.values, torch.float32)
    torch.testing.assert_close(made, expected["pixel_values"], rtol=0, atol=0)


def test_patch_images(tmp_path):
    config, _ = write_qwen_folder(tmp_path)
    image_format = read_patch_images(config, tmp_path)
    assert image_format.placeholder == "<|vision_start|><|image_pad|><|vision_end|>"
    assert image_format.expand(32, 64) == f"<|vision_start|>{'<|image_pad|>' * 8}<|vision_end|>"
    assert image_format.reserved == QWEN_TOKENS
    (tmp_path / "old").mkdir()
    older = {"size": None, "min_pixels": 2_000, "max_pixels": 40_000}  # Qwen2-VL's
    config, _ = write_qwen_folder(tmp_path / "old", **older)
    assert read_patch_images(config, tmp_path / "old") == image_format


def test_blank_images_are_the_smallest(tmp_path):
    for folder, write, read, patches in (
        ("gemma", write_gemma_folder, read_fixed_images, 1),
        ("qwen", write_qwen_folder, read_patch_images, 4),
    ):
        (tmp_path / folder).mkdir()
        config, _ = write(tmp_path / folder)
        image_format = read(config, tmp_path / folder)
        pixels = image_format.arrange([image_format.blank()])
        assert len(pixels.values) == patches and not pixels.values.any()


def change(folder, **settings) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


WRONG = [
    ({"do_pan_and_scan": True}, "do_pan_and_scan is True; only false is supported"),
    ({"do_resize": False}, "do_resize is False; only true is supported"),
    ({"do_convert_rgb": False}, "do_convert_rgb is False; only true is supported"),
    ({"rescale_factor": 1.0}, "rescale_factor is 1.0; only 1/255 is supported"),
    ({"image_processor_type": "SiglipImageProcessor"}, "Gemma3ImageProcessor is read here"),
    ({"size": {"height": 28, "width": 14}}, "its height and width must be equal"),
    ({"size": 28}, "size is 28; it must be a whole number"),
    (
        {"size": {"height": 35, "width": 35}},
        "size is 35, but config.json says image_size of vision_config 28",
    ),
    ({"size": {"height": 10**9, "width": 10**9}}, "from 1 to 8,192"),
    ({"image_mean": [0.5]}, "it must be three numbers"),
    ({"image_mean": ["a", "b", "c"]}, "it must be three numbers"),
    ({"image_std": [0.5, 0.0, 0.5]}, "none of the three may be 0"),
    ({"resample": 9}, "PIL's number of a filter"),
    ({"resample": [2]}, "PIL's number of a filter"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_settings_that_are_not_followed_are_refused(settings, message, tmp_path):
    config, _ = write_gemma_folder(tmp_path)
    change(tmp_path, **settings)
    with pytest.raises(UserError) as caught:
        read_fixed_images(config, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path / "preprocessor_config.json") in str(caught.value)


WRONG_PATCHES = [
    ({"patch_size": 0}, "patch_size is 0; it must be a whole number"),
    ({"patch_size": 16}, "patch_size is 16, but config.json says patch_size of vision_config 8"),
    ({"merge_size": 3}, "merge_size is 3, but config.json says spatial_merge_size of vision_config 2"),
    ({"size": {"shortest_edge": 50_000, "longest_edge": 40_000}}, "must not be above its longest_edge"),
    ({"size": {"height": 5, "width": 5}}, "it must be a whole number from 1 to"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_PATCHES)
def test_settings_of_patches_are_checked(settings, message, tmp_path):
    config, _ = write_qwen_folder(tmp_path)
    change(tmp_path, **settings)
    with pytest.raises(UserError, match=message):
        read_patch_images(config, tmp_path)


def test_files_that_do_not_belong_together(tmp_path):
    config, _ = write_gemma_folder(tmp_path)
    with pytest.raises(UserError, match="takes no other size; leave it out"):
        read_fixed_images(config, tmp_path).limit_side(56)
    config.mm_tokens_per_image = 9
    with pytest.raises(UserError, match=r"image_seq_length is 4, but .* says mm_tokens_per_image 9"):
        read_fixed_images(config, tmp_path)
    config.mm_tokens_per_image, config.image_token_index = 4, 65  # a byte
    config.image_token_id = 65
    with pytest.raises(UserError, match="image_token_index is 65, which is no special token"):
        read_fixed_images(config, tmp_path)
    config.image_token_id = config.image_token_index = 262_144
    with pytest.raises(UserError, match="image_token_index is 262144, which is no special token"):
        read_fixed_images(config, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="has no preprocessor_config"):
        read_fixed_images(config, tmp_path)
