"""The tool that pretrains the embedded model that takes images: its text, its batches, its two stages."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F

from tools.pretrain_toy_vision import (
    IGNORE,
    IMAGE_TOKENS,
    TOKENS,
    CaptionWriter,
    FigureReader,
    caption_batches,
    drawing_batches,
    make_batch,
    make_model,
    make_processor,
    train_tokenizer,
)
from tools.toy_captions import IMAGE, documents
from tools.toy_drawings import COLORS, SHAPES
from tools.toy_pretraining import run_steps

NAMED = {*COLORS, *SHAPES}


@pytest.fixture(scope="module")
def processor():
    return make_processor(train_tokenizer(0))


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def test_pretraining_never_names_what_a_drawing_shows():
    """So the base cannot answer the questions. It knows the words of all answers, from texts alone."""
    texts = list(itertools.islice(documents(1), 1000))
    shown = set().union(*(words(document.text) for document in texts if document.drawing))
    told = set().union(*(words(document.text) for document in texts if not document.drawing))
    assert not shown & NAMED and told >= NAMED
    assert all((IMAGE in document.text) == (document.drawing is not None) for document in texts)


def test_no_image_token_and_no_padding_is_learned(processor):
    rows = list(itertools.islice(documents(0), 16))
    batch = make_batch(processor, rows)
    learned = batch["input_ids"][batch["labels"] != IGNORE]
    names = [*IMAGE_TOKENS.values(), "<pad>"]
    unlearned = torch.tensor([processor.tokenizer.get_vocab()[name] for name in names])
    assert len(learned) > 100 and not torch.isin(learned, unlearned).any()
    assert batch["token_type_ids"].sum() == TOKENS * sum(row.drawing is not None for row in rows)


def changed_by(stage: torch.nn.Module, batches, model) -> set[str]:
    """Return the names of the model's parameters that a step changes."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run_steps(stage, batches, steps=1, peak_lr=1e-3, warmup_steps=1)
    return {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}


def test_what_each_stage_trains(processor):
    model = make_model(processor.tokenizer, seed=0)
    names = {name for name, _ in model.named_parameters()}
    reader = FigureReader(model)
    first = changed_by(reader, drawing_batches(processor, 2), model)
    assert first == {name for name in names if "vision_tower" in name or "projector" in name}
    second = changed_by(CaptionWriter(model, reader), caption_batches(processor, 1), model)
    assert second == names


def test_each_token_of_an_image_tells_what_it_shows(processor):
    """The loss is the mean of the tokens' losses, each that of a head which sees this token alone."""
    model = make_model(processor.tokenizer, seed=0)
    reader = FigureReader(model)
    batch = next(drawing_batches(processor, 2))
    tokens = model.get_image_features(batch["pixel_values"]).pooler_output
    assert tokens.shape[1] == TOKENS
    expected = 0.0
    for i in range(TOKENS):
        color, shape = reader.head(tokens[:, i]).split([len(COLORS), len(SHAPES)], dim=-1)
        expected += F.cross_entropy(color, batch["colors"]) + F.cross_entropy(shape, batch["shapes"])
    torch.testing.assert_close(reader(**batch).loss, expected / TOKENS)
