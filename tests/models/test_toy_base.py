"""The demo's base model: a small trained Llama, and the tool that makes it."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from files.model_folder import TOY_BASE
from files.names import INDEX
from quantization.hqq import HQQ
from quantization.nf4 import NF4
from tests.helpers.layers import quantized
from tests.helpers.programs import ROOT
from tools.pretrain_toy_base import make_model, pretrain, token_batches, train_tokenizer
from tools.toy_corpus import documents

HELD_OUT_SEED = 1000  # pretraining read the documents of seed 1
MAX_LOSS = 0.65  # nats per token; it has 0.58, a random model log(1536) = 7.3


@pytest.fixture(scope="module")
def base():
    """The model in fp32."""
    model, report = AutoModelForCausalLM.from_pretrained(
        TOY_BASE, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY_BASE)


@torch.no_grad()
def held_out_loss(model, tokenizer) -> float:
    ids = next(token_batches(tokenizer, HELD_OUT_SEED))
    return model(input_ids=ids, labels=ids).loss.item()


def test_the_folder_is_small_and_sharded():
    shards = list(TOY_BASE.glob("*.safetensors"))
    index = json.loads((TOY_BASE / INDEX).read_text())
    assert sum(path.stat().st_size for path in shards) <= 3e6
    assert {path.name for path in shards} == set(index["weight_map"].values()) and len(shards) > 1


def test_it_has_learned_its_language(base, tokenizer):
    assert held_out_loss(base, tokenizer) < MAX_LOSS
    random = make_model(tokenizer, seed=0)
    assert held_out_loss(random, tokenizer) > math.log(len(tokenizer)) - 0.5


@torch.no_grad()
def quantized_loss(base, tokenizer, quantizer) -> float:
    """Return the loss with the decoder layers' linears packed and dequantized."""
    linears = {
        f"{name}.weight": quantized(module.weight, torch.float32, None, quantizer).weight
        for name, module in base.named_modules()
        if name.endswith("_proj")
    }
    ids = next(token_batches(tokenizer, HELD_OUT_SEED))
    return torch.func.functional_call(base, linears, (), {"input_ids": ids, "labels": ids}).loss.item()


def test_quantizers_keep_what_it_has_learned(base, tokenizer):
    """The loss rises with each bit that is left out: hardly with 4 bits, clearly with 2."""
    exact = held_out_loss(base, tokenizer)
    rises = {bits: quantized_loss(base, tokenizer, HQQ(bits)) - exact for bits in (8, 4, 3, 2)}
    assert abs(rises[8]) < 3e-4 < rises[4] < 5e-3 and 2 * rises[4] < rises[3] < 0.02 < rises[2] < 0.15
    assert abs(quantized_loss(base, tokenizer, NF4()) - exact) < 3e-3


def test_the_tool_makes_the_saved_tokenizer(tmp_path):
    train_tokenizer(0).save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (TOY_BASE / path.name).read_bytes(), path.name


def test_the_tool_trains(tokenizer):
    short = (ids[:1] for ids in token_batches(tokenizer, 1))
    assert pretrain(make_model(tokenizer, seed=0), short, steps=20) < math.log(len(tokenizer))


@pytest.mark.parametrize("text", ["Two geese: gänse, 鹅!\n\n### 4 2", "a  b _ c", " ", "\n"])
def test_every_text_survives_the_tokenizer(text, tokenizer):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@torch.no_grad()
def test_no_half_characters_are_likely(base, tokenizer):
    """Bytes above 127 are parts of characters; the text has none."""
    parts = torch.tensor(tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(128, 256)]))
    ids = tokenizer("Below is a list of words.\n\n### Response:\n", return_tensors="pt")["input_ids"]
    assert base(input_ids=ids).logits.softmax(-1)[..., parts].sum(-1).max() < 1e-3


def test_the_text_has_no_instruction_with_its_answer():
    """The demo's questions and their format are new to the base: the fine-tuning teaches them."""
    text = "\n".join(itertools.islice(documents(1), 5000))
    rows = [json.loads(line) for line in (ROOT / "datasets" / "toy.jsonl").read_text().splitlines()]
    assert "### Response:" not in text and "### Instruction:" not in text
    questions = {row["instruction"] for row in rows if row["instruction"].endswith("?")}
    assert len(questions) > 100 and not [q for q in questions if q in text]
    known = set(re.findall(r"\w+", text))
    asked = {word for row in rows for value in row.values() for word in re.findall(r"\w+", value)}
    assert not asked - known, "words that the base has never seen"
