"""training/run_images.py: how the model of a run takes images."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models.gemma3 import VISION, WRAPPER
from models.image_settings import read_fixed_images, read_patch_images
from options.config import Config
from options.errors import UserError
from tests.helpers.image_folders import write_gemma_folder, write_qwen_folder
from training.recorded import make_paths_absolute
from training.run_images import read_image_format


def test_the_size_of_images_is_the_model_s(tmp_path):
    """--image_size lowers that of images that vary, and of no others. Without vision parts there is none."""
    family = replace(WRAPPER, vision=replace(VISION, read_format=read_patch_images)).with_images()
    config, _ = write_qwen_folder(tmp_path)
    whole = read_image_format(family, config, tmp_path, None)
    smaller = read_image_format(family, config, tmp_path, 64)
    assert whole.count_tokens(400, 400) > smaller.count_tokens(400, 400) == 16
    assert read_image_format(WRAPPER, config, tmp_path, None) is None

    (tmp_path / "gemma").mkdir()
    config, _ = write_gemma_folder(tmp_path / "gemma")
    family = replace(WRAPPER, vision=replace(VISION, read_format=read_fixed_images)).with_images()
    with pytest.raises(UserError, match=r"^--image_size 64: this model .* takes no other size; leave it out"):
        read_image_format(family, config, tmp_path / "gemma", 64)


def test_the_image_folder_is_recorded_as_a_full_path(tmp_path, monkeypatch):
    """So that config.yaml repeats the run from any folder."""
    monkeypatch.chdir(tmp_path)
    recorded = make_paths_absolute(Config(image_folder="scans"), "model")
    assert recorded.image_folder == str(tmp_path / "scans")
