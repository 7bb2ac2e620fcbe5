"""Samples and evaluation during training on images are those of generate.py and evaluate.py on the RUN."""

from __future__ import annotations

import base64
import io
import json
import math
import re

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import LlamaConfig

import evaluate
import generate
import train
from data.image_batches import plan_prompt_images
from data.image_sizes import FixedImages
from data.images import ImageRef
from data.pixels import read_pixels
from options.train import parse
from tests.helpers.adapters import args_for
from tests.helpers.here import context
from tests.helpers.image_folders import write_talkative_gemma
from tests.helpers.image_models import FORMAT, IMAGE
from tests.helpers.images import TEMPLATE
from tests.helpers.picture_rows import make_picture_rows, write_pictures
from tests.helpers.pictures import draw
from tests.helpers.runs import full_run
from training.evaluation import mean_loss

TOKENS = 6
QUESTION = "What is it?"


def write_rows(folder) -> list[dict]:
    """Write five rows with none, one and two images to rows.jsonl, and return them."""
    for i, color in enumerate(("red", "blue", "green")):
        picture = draw("RGB", (40 + i, 30), seed=i)
        picture.paste(color, (0, 0, 40, 15 * (i % 2)))
        picture.save(folder / f"{i}.png")
    images = [["0.png"], ["1.png", "2.png"], [], ["2.png"], ["1.png"]]
    rows = [
        {"images": shown, "question": QUESTION * (1 + i % 2), "answer": f"It is {i}."}
        for i, shown in enumerate(images)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def trained(two_ranks, tmp_path_factory):
    """(RUN of two ranks, what it printed, file of its rows)."""
    pytest.importorskip("tensorboard")
    root = tmp_path_factory.mktemp("trained")
    model = write_talkative_gemma(root / "model", TEMPLATE)
    write_rows(root)
    rows, folder = root / "rows.jsonl", root / "run"
    options = ["--num_epochs", 2, "--batch_size", 1, "--max_steps", 4, "--lr", "5e-2", "--world_size", 2]
    options += ["--log_to", "tensorboard", "--output_dir", folder, "--eval_dataset", rows, "--eval_every", 4]
    options += ["--sample_every", 4, "--sample_tokens", TOKENS, "--sample_prompts", rows]
    args = args_for(model, rows, "bnb_dora", *options)
    printed = two_ranks(full_run, train.check_run(parse([*map(str, args)])[0]))[0]
    return folder, printed, rows


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_the_answers_of_generate(trained, capsys):
    """Before training those of the base, at the end the run's: sharded or not, with a cache or without."""
    folder, _, rows = trained
    samples = lines_of(folder / "samples.jsonl")
    capsys.readouterr()
    assert (
        generate.main([str(folder), "--prompts", str(rows), "--max_new_tokens", str(TOKENS), "--json"]) == 0
    )
    asked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for model, step in enumerate((0, 4)):
        found = [sample["text"] for sample in samples if sample["step"] == step]
        assert found == [line["answers"][model]["text"] for line in asked]
    assert len({sample["text"] for sample in samples}) > 5
    assert [sample["reference"] for sample in samples[:2]] == ["It is 0.", "It is 1."]
    assert [image["label"] for image in samples[1]["images"]] == ["1.png 41x30", "2.png 42x30"]
    assert "images" not in samples[2]
    copies = {image["copy"] for sample in samples for image in sample.get("images", ())}
    assert copies == {path.name for path in (folder / "sample_images").iterdir()} and len(copies) == 3
    pictures = re.findall(
        r'<img src="data:image/jpeg;base64,([^"]*)" alt="(\d)', (folder / "report.html").read_text()
    )
    assert [number for _, number in pictures] == ["0", "1", "2", "2", "1"]
    with (
        Image.open(io.BytesIO(base64.b64decode(pictures[2][0]))) as copy,
        Image.open(rows.parent / "2.png") as own,
    ):
        difference = torch.tensor(list(copy.tobytes())).float() - torch.tensor(list(own.tobytes())).float()
    assert copy.size == own.size and difference.abs().mean() < 60


def test_the_logger_gets_the_images(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(trained[0] / "tensorboard")).Reload()
    shown = ["1/image_1", "2/image_1", "2/image_2", "4/image_1", "5/image_1"]
    assert reader.Tags()["images"] == [f"samples/{name}" for name in shown]


def test_evaluation_is_that_of_the_command(trained, capsys, tmp_path):
    folder, _, _ = trained
    loss = lines_of(folder / "metrics.jsonl")[-1]["eval_loss"]
    capsys.readouterr()
    options = [
        "--metrics",
        "perplexity,exact_match",
        "--max_new_tokens",
        TOKENS,
        "--out",
        tmp_path / "out.json",
    ]
    assert evaluate.main([*map(str, [folder, "--batch_size", 3, *options])]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["metrics"]["perplexity"]["tuned"] == pytest.approx(math.exp(loss), rel=1e-5)
    answers, samples = results["answers"], lines_of(folder / "samples.jsonl")[-5:]
    assert [answer["tuned"] for answer in answers] == [sample["text"].strip() for sample in samples]
    assert answers[1]["images"] == ["1.png 41x30", "2.png 42x30"]


def test_grown_sequences_have_the_same_images():
    """As if they had been planned with that length; images may end where a sequence does."""
    refs = [ImageRef("x", 0, None, 8, 8, "")] * 3
    asked = [([5, *[IMAGE] * 4], refs[:1]), ([*[IMAGE] * 4, 6, *[IMAGE] * 4], refs[1:])]
    short, long = (plan_prompt_images(asked, length, FORMAT) for length in (9, 13))
    pixels = [FORMAT.blank()] * 3
    grown, expected = short.with_pixels(pixels).lengthen(13), long.with_pixels(pixels)
    assert grown.bounds == expected.bounds and short.bounds != long.bounds
    assert torch.equal(grown.positions, expected.positions) and torch.equal(grown.owners, expected.owners)


def loss_of_images(rank_info, rows) -> tuple[float, int]:
    """Return (the mean loss of a model that adds up pixels, the number of blank images that it got)."""
    model, blank = nn.Linear(1, 1), 0
    model.config = LlamaConfig()

    def loss_sum(model, batch):
        nonlocal blank
        if batch.images is None:
            return torch.zeros(())
        blank += not batch.images.bounds
        means = batch.images.values.double().mean((1, 2, 3))
        return sum(
            (means[i] * (first - start) for i, (start, first, _) in enumerate(batch.images.bounds)),
            start=torch.zeros(()),
        )

    return mean_loss(model, rows, 2, loss_sum, rank_info, context), blank


def test_rows_are_evaluated_with_their_images(one_rank, two_ranks, tmp_path):
    """A rank without images gets a blank one while the other rank has some."""
    image_format = FixedImages("", 7, (), (0.5,) * 3, (0.5,) * 3, text="", n_tokens=4, side=8, resample=2)
    counts = [1, 0, 2, 0, 0, 1, 0, 0, 0, 1, 0]
    rows = make_picture_rows(write_pictures(tmp_path, sum(counts)), counts, image_format)
    expected = 0.0
    for i in range(len(rows)):
        tokens = rows.tokens[rows.starts[i] : rows.starts[i + 1]]
        firsts = (tokens == 7).nonzero()[::4, 0].tolist()
        for first, ref in zip(firsts, rows.images.of_row(i), strict=True):
            expected += first * float(read_pixels(ref, image_format).double().mean())
    expected /= int(rows.targets().sum())
    ((alone, _),) = one_rank(loss_of_images, rows)
    assert alone == pytest.approx(expected, rel=1e-6)
    both = two_ranks(loss_of_images, rows)
    assert [loss for loss, _ in both] == pytest.approx([expected] * 2, rel=1e-6)
    assert sum(blank for _, blank in both), "a rank had none, and the other one had some"
