"""The tool that pretrains the embedded model that takes images: its text, its batches, its two stages."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from tools.pretrain_toy_vision import (
    IGNORE,
    IMAGE_TOKENS,
    TOKENS,
    make_batch,
    make_model,
    make_processor,
    teach_tower,
    train_tokenizer,
)
from tools.toy_captions import IMAGE, documents
from tools.toy_drawings import COLORS, SHAPES

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


def test_the_first_stage_trains_tower_and_projector_alone(processor):
    model = make_model(processor.tokenizer, seed=0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    teach_tower(model, processor, steps=1, seed=2)
    changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert changed == {name for name in before if "vision_tower" in name or "projector" in name}
