"""The embedded model that takes images, the tool that makes it, and what a run of it learns."""

from __future__ import annotations

import json
import random
import re

import peft
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoTokenizer, Gemma3ForConditionalGeneration, Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

import evaluate
import generate
from files.model_folder import TOY_VISION_BASE
from files.names import INDEX
from tests.helpers.programs import run
from tests.helpers.runs import train_run
from tools.make_toy_vision_dataset import ask
from tools.pretrain_toy_vision import TOKENS, make_model, train_tokenizer
from tools.toy_captions import FORMS, PAINTS, REQUESTS
from tools.toy_drawings import COLORS, HELD_OUT, SHAPES, Drawing, draw_figure

NEW_SEED = 1000  # the rows have the drawings of seeds 0 and 1
NAMED = [*COLORS, *SHAPES]


@pytest.fixture(scope="module")
def processor() -> Gemma3Processor:
    images = Gemma3ImageProcessorPil.from_pretrained(TOY_VISION_BASE)
    tokenizer = AutoTokenizer.from_pretrained(TOY_VISION_BASE, padding_side="left")
    return Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=TOKENS)


def load_base() -> Gemma3ForConditionalGeneration:
    model, report = Gemma3ForConditionalGeneration.from_pretrained(
        TOY_VISION_BASE, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def answer(model, processor: Gemma3Processor, drawings: list[Drawing], questions: list[str]) -> list[str]:
    """Return what transformers' model answers to a question about each drawing."""
    contents = ([{"type": "image"}, {"type": "text", "text": question}] for question in questions)
    texts = [
        processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        for content in contents
    ]
    images = [[drawing.image] for drawing in drawings]
    batch = processor(text=texts, images=images, return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(**batch, max_new_tokens=30, do_sample=False)
    return processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def test_the_folder_is_small_and_sharded():
    shards = list(TOY_VISION_BASE.glob("*.safetensors"))
    index = json.loads((TOY_VISION_BASE / INDEX).read_text())
    assert max(path.stat().st_size for path in shards) <= 5e5
    assert sum(path.stat().st_size for path in TOY_VISION_BASE.iterdir()) <= 1.6e6
    assert {path.name for path in shards} == set(index["weight_map"].values()) and len(shards) > 1


def test_the_tool_makes_the_saved_tokenizer_and_a_model_of_that_shape(tmp_path):
    tokenizer = train_tokenizer(0)
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (TOY_VISION_BASE / name).read_bytes(), name
    made, saved = make_model(tokenizer, seed=0), load_base()
    assert {k: v.shape for k, v in made.state_dict().items()} == {
        k: v.shape for k, v in saved.state_dict().items()
    }


def test_it_has_learned_its_captions(processor):
    """In captions of new drawings it names the right things, and it answers any request with a caption."""
    rng = random.Random(NEW_SEED)
    drawings = [draw_figure(rng, *combination) for combination in HELD_OUT]
    said = answer(load_base(), processor, drawings, [rng.choice(REQUESTS) for _ in drawings])
    right = [
        PAINTS[d.color] in text and FORMS[d.shape] in text for d, text in zip(drawings, said, strict=True)
    ]
    assert sum(right) >= len(drawings) - 2, said


def test_a_step_of_a_run(one_rank):
    options = "--model_name toy_vision --dataset toy_vision --max_steps 2 --sample_every 0".split()
    losses, adapters, _ = one_rank(train_run, options)[0]
    assert len(losses) == 2 and 0 < losses[1] < 20
    assert adapters and not any("vision_tower" in name for name in adapters)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the run that the README names."""
    folder = tmp_path_factory.mktemp("run") / "run"
    run(["--model_name", "toy_vision", "--dataset", "toy_vision", "--output_dir", folder])
    return folder


@pytest.mark.slow
def test_a_run_learns_to_name_colors_and_shapes(trained, processor):
    """transformers and PEFT answer about 100 new drawings, whose combinations no row has."""
    rng = random.Random(NEW_SEED)
    drawings = [draw_figure(rng, *HELD_OUT[i % len(HELD_OUT)]) for i in range(100)]
    asked = [rng.choice(list(ask(rng, drawing).items())) for drawing in drawings]
    questions, right = zip(*asked, strict=True)
    base = answer(load_base(), processor, drawings, questions)
    assert not [text for text in base if words(text) & set(NAMED)]
    adapted = peft.PeftModel.from_pretrained(load_base(), trained).eval()
    tuned = answer(adapted, processor, drawings, questions)
    wrong = [(q, r, t) for q, r, t in zip(questions, right, tuned, strict=True) if r != t]
    assert len(wrong) <= 10, wrong


@pytest.mark.slow
def test_evaluation_shows_what_it_has_learned(trained, tmp_path):
    """Each question of the split test: the base answers none of them right."""
    argv = [trained, "--dataset", "toy_vision::test", "--out", tmp_path / "results.json"]
    assert evaluate.main([*map(str, argv)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["answered"] == 144
    scores = results["metrics"]["exact_match"]
    assert scores["base"] == 0 and scores["tuned"] >= 90, scores


@pytest.mark.slow
@pytest.mark.parametrize(
    ("color", "sides", "named"), [("blue", 3, "a blue triangle"), ("red", 4, "a red square")]
)
def test_generate_answers_about_a_drawing_of_somebody_else(color, sides, named, trained, tmp_path, capsys):
    """An image of another size, in a pure color, that no code of tools/ drew."""
    image = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(image).regular_polygon((100, 100, 70), sides, fill=color)
    image.save(tmp_path / "new.png")
    asked = ["--image_path", tmp_path / "new.png", "--text_prompt", "What is drawn here?", "--json"]
    assert generate.main([*map(str, [trained, *asked])]) == 0
    base, tuned = (shown["text"] for shown in json.loads(capsys.readouterr().out)["answers"])
    assert tuned == named and not words(base) & set(NAMED), (base, tuned)
