"""Whole runs of Qwen3-VL and Qwen2.5-VL on images, from a folder as the hub has it to answers and a merge."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import peft
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import export
import generate
import plan
from checkpoints.storage import checkpoint_folder
from tests.helpers.auto_classes import load_transformers_model
from tests.helpers.image_folders import write_qwen_model
from tests.helpers.pictures import draw
from tests.helpers.products import slow
from tests.helpers.resuming import adapter, repeatable_metrics, run
from tests.helpers.runs import dense_state, transformers_model

KINDS = ["qwen3_vl", "qwen2_5_vl"]
SIZES = [(40, 60), (90, 30), (33, 70), (100, 100), (64, 48)]
QUESTION, NEW, PENALTY = "What is it?", 8, 3.0
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


class QwenRun:
    """A tiny model's folder, a data set of pictures, and a run on them, whose adapter is trained."""

    def __init__(self, folder: Path, kind: str, one_rank):
        folder.mkdir()
        self.kind, self.base, self.pictures = kind, write_qwen_model(folder / "model", kind), []
        rows = [{"question": "Is it here?", "answer": "No."}]
        for i, size in enumerate(SIZES):
            self.pictures.append(folder / f"{i}.png")
            draw("RGB", size, seed=i).save(self.pictures[-1])
            rows.append({"image": f"{i}.png", "question": f"What is {i}?", "answer": f"A scan of {i}."})
        (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        options = (
            "--train_type bnb_dora --lora_rank 4 --lr 3e-2 --vision_targets all --num_epochs 2"
            " --batch_size 1 --save_every 1 --keep -1 --log_to stdout --deterministic --compile false"
        )
        self.args = [
            "--model_name",
            str(self.base),
            "--dataset",
            str(folder / "rows.jsonl"),
            *options.split(),
        ]
        self.out = folder / "run"
        self.printed = one_rank(run, [*self.args, "--output_dir", str(self.out)])[0]


@pytest.fixture(scope="module")
def trained(one_rank, tmp_path_factory):
    """trained(kind) -> QwenRun."""
    made: dict[str, QwenRun] = {}

    def get(kind: str) -> QwenRun:
        if kind not in made:
            made[kind] = QwenRun(tmp_path_factory.mktemp("qwen") / kind, kind, one_rank)
        return made[kind]

    return get


def inputs_of_transformers(base: Path, text: str, paths) -> dict:
    """Return the arguments of transformers' forward for a text with IMAGE for each path.

    The pixels are those of transformers' processor. Its processor of texts needs one of videos, and this
    torchvision, so the token of an image is repeated here.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    given = {}
    if paths:
        images = [Image.open(path).convert("RGB") for path in paths]
        given = dict(Qwen2VLImageProcessorPil.from_pretrained(base)(images=images, return_tensors="pt"))
        parts = text.split("<|image_pad|>")
        counts = [math.prod(grid) // 4 for grid in given["image_grid_thw"].tolist()]
        text = parts[0] + "".join(
            "<|image_pad|>" * n + part for n, part in zip(counts, parts[1:], strict=True)
        )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return {"input_ids": ids, "mm_token_type_ids": kinds, **given}


def answer_of(model, inputs: dict, base: Path) -> str:
    """Return the greedy answer of a model of transformers or PEFT, without a cache."""
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, use_cache=False, repetition_penalty=PENALTY,
            pad_token_id=0,
        )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def prompt_of(question: str) -> str:
    """Return a question as QWEN_TEMPLATE writes it."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", ["qwen3_vl", *slow(["qwen2_5_vl"])])
def test_a_run_answers_as_peft(kind, trained, one_rank, capsys):
    """Token for token: two images of different sizes, one, and none; base and tuned model."""
    made = trained(kind)
    assert "5 images" in made.printed
    base = transformers_model(made.base, one_rank(dense_state, made.args)[0])
    tuned = peft.PeftModel.from_pretrained(base, made.out).eval()
    answers = set()
    for paths in (made.pictures[:2], made.pictures[3:4], []):
        named = [word for path in paths for word in ("--image_path", str(path))]
        asked = ["--text_prompt", QUESTION, *named, "--max_new_tokens", NEW, "--repetition_penalty", PENALTY]
        assert generate.main([*map(str, [made.out, *asked, "--json"])]) == 0
        [line] = capsys.readouterr().out.splitlines()
        inputs = inputs_of_transformers(made.base, prompt_of(IMAGE * len(paths) + QUESTION), paths)
        with tuned.disable_adapter():
            expected = [answer_of(tuned, inputs, made.base)]
        expected.append(answer_of(tuned, inputs, made.base))
        assert [answer["text"] for answer in json.loads(line)["answers"]] == expected
        answers |= {*expected}
    assert len(answers) == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_has_the_logits(kind, trained, one_rank, capsys, tmp_path):
    """transformers loads it with its vision parts; PEFT has the adapter over the dequantized base."""
    made = trained(kind)
    exported = ["--to", "merged", "--out", tmp_path / "out", "--dtype", "float32"]
    assert export.main([*map(str, [made.out, *exported])]) == 0
    found = re.search(
        r"trained model: (\S+), .* \(3 rows of the data with 2 images,", capsys.readouterr().out
    )
    assert found and float(found[1]) < 1e-4
    merged = load_transformers_model(tmp_path / "out", dtype=torch.float32).eval()
    base = transformers_model(made.base, one_rank(dense_state, made.args)[0])
    tuned = peft.PeftModel.from_pretrained(base, made.out).eval()
    inputs = inputs_of_transformers(made.base, prompt_of(IMAGE * 2 + QUESTION), made.pictures[:2])
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, tuned(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "packing"), [("qwen3_vl", True), ("qwen2_5_vl", False)])
def test_a_resumed_run_equals_a_whole_one(kind, packing, trained, two_ranks, tmp_path):
    """Within an epoch, bit for bit, on two ranks of which one may have no image."""
    made, whole, stopped = trained(kind), tmp_path / "whole", tmp_path / "stopped"
    more = ["--packing", "true", "--context_length", "128", "--num_epochs", "4"] if packing else []
    args = [*made.args, *more]
    two_ranks(run, [*args, "--output_dir", str(whole)])
    two_ranks(run, [*args, "--output_dir", str(stopped)])
    two_ranks(run, [*args, "--output_dir", str(stopped), "--resume", str(checkpoint_folder(stopped, 2))])
    assert repeatable_metrics(stopped) == repeatable_metrics(whole)
    torch.testing.assert_close(adapter(stopped), adapter(whole), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", *slow(["qwen3_vl"])])
def test_a_plan_of_the_folder(kind, tmp_path, capsys):
    """64 x 64 pixels are 16 tokens of 16 x 16 pixels."""
    folder = write_qwen_model(tmp_path / "model", kind)
    options = "--image_size 64 --packing --context_length 100 --gpus 1 --gpu t4 --json".split()
    assert plan.main(["--model_name", str(folder), "--images_per_row", "2", *options]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["images"] == 6
