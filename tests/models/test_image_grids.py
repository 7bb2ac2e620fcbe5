"""Images that keep their shape: positions and features as in transformers, row by row, without a wait."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextModel,
)

from models import attention
from models.attention import CAUSAL
from models.family import FUSED
from models.image_grids import image_positions
from models.qwen3_vl import add_features
from models.registry import build_on_meta, read_config
from tests.helpers.image_models import MODELS, QWEN, ROWS, ImageRows, packed, padded, row_of_transformers
from tests.helpers.tiny import CONFIGS

MERGE, META = 2, torch.device("meta")


def positions_of(rows: ImageRows) -> torch.Tensor:
    return image_positions(rows.images, MERGE, rows.batch.positions)


def positions_of_transformers(row: int) -> torch.Tensor:
    """Return the positions of one row by itself, [3, T]."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(CONFIGS["qwen3_vl"]()).model
    inputs = {k: v for k, v in row_of_transformers(row, QWEN).items() if k != "pixel_values"}
    return model.get_rope_index(**inputs)[0][:, 0]


def test_positions_are_transformers_row_by_row():
    """Rows with two, one, three and no images of several sizes; padded, and in packs of two and three."""
    expected = [positions_of_transformers(row) for row in ROWS]
    found = positions_of(padded(ROWS, of=QWEN))
    for row, positions in enumerate(expected):
        assert torch.equal(found[:, row, : positions.shape[1]], positions)
    for sequence, pack in enumerate(packs := [[1, 2], [4, 0, 3]]):
        positions = torch.cat([expected[row] for row in pack], dim=1)
        assert torch.equal(positions_of(packed(packs, QWEN))[:, sequence, : positions.shape[1]], positions)


def test_a_blank_image_moves_no_position():
    rows = padded([2, 2], blank=True, of=QWEN)
    assert torch.equal(positions_of(rows), torch.arange(max(QWEN.lengths())).expand(3, 2, -1))


def test_features_are_added_where_transformers_adds_them():
    images = padded(ROWS, of=QWEN).images
    hidden = torch.randn(*images.owners.shape, 8)
    features = torch.randn(len(images.positions), 8)
    expected = Qwen3VLTextModel._deepstack_process(None, hidden, images.owners > 0, features)
    for where in (images.positions, images.owners > 0):
        assert torch.equal(add_features(hidden, where, features), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", [CAUSAL, FUSED])
def test_the_host_reads_nothing_of_the_device(implementation, name, checkpoints, monkeypatch):
    """On the meta device, where each read is an error: on a GPU the host would wait for it."""
    monkeypatch.setattr(attention, "compute_dtype", lambda x: x.dtype)  # meta has no autocast to ask for
    of = MODELS[name]
    model = build_on_meta(*read_config(checkpoints(of.kind), images=True), implementation)
    rows = padded(ROWS, of=of) if implementation == CAUSAL else packed([[0, 1], [2, 3, 4]], of)
    batch, images = rows.batch.to(META), rows.images.map_tensors(lambda tensor: tensor.to(META))
    given = {key: value for key, value in batch.model_inputs().items() if key != "row_lengths"}
    inputs, _ = model.image_inputs(images, None, **given)
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    assert hidden.shape[:2] == batch.ids.shape
