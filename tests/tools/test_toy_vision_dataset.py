"""The data set of drawings: the rows that the tool makes, and how the program reads them."""

from __future__ import annotations

import base64
import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from data.sources import find_recipe, load_rows
from tests.helpers.programs import ROOT
from tools.make_toy_vision_dataset import DRAWINGS, SHOWN, draw_rows
from tools.toy_drawings import COLORS, HELD_OUT, SHAPES


def pixels(row: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(row["image"]["bytes"]))).convert("RGB"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_rows_are_those_of_the_tool(split):
    """The test split has combinations of a color and a shape that the other one lacks."""
    lines = (ROOT / "datasets" / "toy_vision" / f"{split}.jsonl").read_text().splitlines()
    saved = [json.loads(line) for line in lines]
    made = draw_rows(random.Random(list(DRAWINGS).index(split)), SHOWN[split], DRAWINGS[split])
    for one, other in zip(saved, made, strict=True):
        assert (one["questions"], one["answers"]) == (other["questions"], other["answers"])
        np.testing.assert_array_equal(*(pixels(row) for row in (one, other)))
    both = {tuple(row["answers"][:2]) for row in saved}
    assert both == set(SHOWN[split]) and (both == set(HELD_OUT)) == (split == "test")


def test_each_color_and_shape_is_in_both_splits():
    for pairs in SHOWN.values():
        colors, shapes = zip(*pairs, strict=True)
        assert (set(colors), set(shapes)) == (set(COLORS), set(SHAPES))


@pytest.mark.parametrize(("name", "count"), [("toy_vision", 252), ("toy_vision::test", 48)])
def test_the_recipe_reads_each_split(name, count, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    rows = load_rows(*find_recipe(name), samples=-1)
    assert len(rows.rows) == count and {len(row["questions"]) for row in rows.rows} == {3}
