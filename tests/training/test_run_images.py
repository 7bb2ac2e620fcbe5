"""A run has images if its rows do: from a file of questions about images to an adapter."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from files.names import ADAPTER
from finished.finished_run import open_run
from launch.ranks import RankInfo
from models.gemma3 import VISION, WRAPPER
from models.image_settings import read_patch_images
from options.config import Config
from options.errors import UserError
from options.train import parse
from tests.helpers.image_folders import write_gemma_folder, write_gemma_model, write_qwen_folder
from tests.helpers.resuming import run
from tests.helpers.runs import make_job
from training.recorded import make_paths_absolute
from training.run_images import read_image_format

ONE_RANK = RankInfo(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_gemma_model(tmp_path_factory.mktemp("gemma") / "model")


def write_rows(folder, images: bool, deep: tuple[int, ...] = ()):
    """Write questions; with images, all but the first have one. deep: which images have 16 bits."""
    rows = [{"question": f"What is {i}?", "answer": f"A scan of {i}."} for i in range(6)]
    for i, row in enumerate(rows[1:] if images else ()):
        color = {"I;16": 300, "RGB": (40 * i, 90, 200)}
        mode = "I;16" if i in deep else "RGB"
        Image.new(mode, (20 + i, 30), color[mode]).save(folder / f"{i}.png")
        row["image"] = f"{i}.png"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def arguments(model, data, *more) -> list[str]:
    options = ["--model_name", model, "--dataset", data, "--train_type", "bnb_dora", "--lora_rank", 4, *more]
    return [str(word) for word in options]


@pytest.mark.parametrize(
    ("deep", "said"), [((), None), ((1,), "1 grey image has"), ((0, 3), "2 grey images have")]
)
def test_a_line_counts_images_of_more_than_8_bits(model, deep, said, tmp_path):
    """Each counts once, also those of rows to evaluate on and of prompts."""
    rows = write_rows(tmp_path, images=True, deep=deep)
    args = arguments(model, rows, "--eval_dataset", rows, "--sample_every", 1)
    remarks = [line for line in make_job(ONE_RANK, args).remarks if "more than 8 bits" in line]
    assert len(remarks) == bool(said) and all(f"data: {said} more than 8 bits" in line for line in remarks)


def test_rows_with_images_are_trained_on(model, one_rank, tmp_path):
    args = arguments(model, write_rows(tmp_path, images=True), "--batch_size", 2)
    tower = [*args, "--vision_targets", "all"]
    output = one_rank(run, [*tower, "--output_dir", str(tmp_path / "run")])[0]
    assert "5 images" in output
    assert any("the projector stays as it is: this" in remark for remark in make_job(ONE_RANK, tower).remarks)
    opened = open_run(tmp_path / "run")
    assert opened.config.images == "true" and opened.family.has_images
    trained = load_file(tmp_path / "run" / ADAPTER)
    moved = {name.split(".")[4] for name, tensor in trained.items() if "lora_B" in name and tensor.any()}
    assert any("vision_tower" in name for name in trained) and len(moved) > 1
    further = make_job(ONE_RANK, [*args, "--adapter", str(tmp_path / "run")])
    assert further.family.has_images and further.config.vision_targets == "all"
    texts = write_rows(tmp_path, images=False)
    unused = make_job(ONE_RANK, arguments(model, texts, "--adapter", str(tmp_path / "run")))
    assert any(line.startswith(f"--adapter {tmp_path}/run: no row has an image") for line in unused.remarks)


def test_the_rows_decide(model, tmp_path):
    with_images = write_rows(tmp_path, images=True)
    job = make_job(ONE_RANK, arguments(model, with_images))
    assert job.config.images == "true" and job.family.has_images and job.files.vision
    assert int(job.rows.image_counts().sum()) == 5
    (tmp_path / "texts").mkdir()
    texts = write_rows(tmp_path / "texts", images=False)
    job = make_job(ONE_RANK, arguments(model, texts))
    assert job.config.images == "false" and not job.family.has_images and job.files.apart
    job = make_job(ONE_RANK, arguments(model, texts, "--sample_every", 1, "--sample_prompts", with_images))
    assert job.config.images == "true" and job.family.has_images and not job.rows.images.refs
    assert len(job.evaluation.prompts[1].images) == 1


@pytest.mark.parametrize(
    "options", ["--images true", "--vision_targets all", "--vision_bits 4", "--vision_bits 4 --images true"]
)
def test_vision_parts_without_images(options, model, checkpoints, tmp_path):
    """They are loaded, and the line about them names the option that was given."""
    texts, given = write_rows(tmp_path, images=False), options.split()
    job = make_job(ONE_RANK, arguments(model, texts, *given))
    line = f"{' '.join(given[:2])}: no row has an image; the model's vision parts are loaded, and not used"
    assert job.family.has_images and line in job.remarks
    with pytest.raises(
        UserError, match=f"^{' '.join(given[:2])}: .*/config.json: llama takes no images here"
    ):
        make_job(ONE_RANK, arguments(checkpoints("llama"), texts, *given))


@pytest.mark.parametrize("option", ["--image_folder /", "--image_size 64", "--images_per_pack 3"])
def test_options_about_images_without_images(option, checkpoints, tmp_path):
    model, texts = checkpoints("llama"), write_rows(tmp_path, images=False)
    with pytest.raises(UserError, match=f"^{option}: has no effect, since no row has an image; leave it out"):
        make_job(ONE_RANK, arguments(model, texts, "--packing", *option.split()))


def test_images_without_settings_of_pixels(model, tmp_path):
    """The model's folder says nothing of them: an error if a row has an image."""
    (model / "preprocessor_config.json").rename(model / "elsewhere.json")
    try:
        (tmp_path / "texts").mkdir()
        texts = write_rows(tmp_path / "texts", images=False)
        assert not make_job(ONE_RANK, arguments(model, texts)).family.has_images
        with pytest.raises(UserError, match=r"rows.jsonl:2: has an image.*; .*has no preproc"):
            make_job(ONE_RANK, arguments(model, write_rows(tmp_path, True)))
    finally:
        (model / "elsewhere.json").rename(model / "preprocessor_config.json")


def test_texts_alone_of_a_model_of_images(model, tmp_path):
    """--images false takes captions for texts and leaves out unread columns; images are an error still."""
    rows = write_rows(tmp_path, images=True)
    with pytest.raises(UserError, match=r"rows.jsonl:2: has an image, .*; --images false is why$"):
        make_job(ONE_RANK, arguments(model, rows, "--images", "false"))
    rows.write_text(rows.read_text().replace('"image"', '"scan"'))
    with pytest.raises(UserError, match=r"rows.jsonl: its column scan holds images"):
        make_job(ONE_RANK, arguments(model, rows))
    assert not make_job(ONE_RANK, arguments(model, rows, "--images", "false")).family.has_images
    rows.write_text('{"question": "Q", "answer": "A", "image": "a red cat"}')
    with pytest.raises(UserError, match=r"image a red cat: no such file .* --images false trains without"):
        make_job(ONE_RANK, arguments(model, rows))
    assert len(make_job(ONE_RANK, arguments(model, rows, "--images", "false")).rows) == 1


def test_the_size_of_images_is_the_model_s(tmp_path):
    """--image_size lowers that of images that vary, and of no others."""
    family = replace(WRAPPER, vision=replace(VISION, read_format=read_patch_images))
    model_config, _ = write_qwen_folder(tmp_path)
    config = parse(["--images", "true"])[0]
    whole, _ = read_image_format(config, model_config, family, tmp_path)
    smaller, _ = read_image_format(replace(config, image_size=64), model_config, family, tmp_path)
    assert whole.count_tokens(400, 400) > smaller.count_tokens(400, 400) == 16
    assert read_image_format(replace(config, images="false"), model_config, family, tmp_path)[0] is None

    (tmp_path / "gemma").mkdir()
    model_config, _ = write_gemma_folder(tmp_path / "gemma")
    with pytest.raises(UserError, match=r"^--image_size 64: this model .* takes no other size; leave it out"):
        read_image_format(replace(config, image_size=64), model_config, WRAPPER, tmp_path / "gemma")


def test_the_image_folder_is_recorded_as_a_full_path(tmp_path, monkeypatch):
    """So that config.yaml repeats the run from any folder."""
    monkeypatch.chdir(tmp_path)
    recorded = make_paths_absolute(Config(image_folder="scans"), "model")
    assert recorded.image_folder == str(tmp_path / "scans")
