"""The old config.json of Qwen2.5-VL, as the hub's releases have it.

The text model's values are beside the others. transformers 5 writes them into text_config.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch

import export
from files.names import CONFIG
from finished.finished_run import load_model, open_run
from models.llama_pro import new_layers
from models.redundant import is_tied_by_default
from models.registry import read_config
from tests.helpers.adapters import args_for
from tests.helpers.auto_classes import load_transformers_model
from tests.helpers.expansion import expand, read_config_json
from tests.helpers.finished_runs import write_random_run
from tests.helpers.image_folders import write_flat_config
from tests.helpers.image_models import IMAGES, QWEN_2_5, ROWS, TOWER, loss_of_transformers, padded
from tests.helpers.logits import IDS
from tests.helpers.products import slow
from tests.helpers.spellings import SPELLINGS, respell


@pytest.fixture
def base(checkpoints, tmp_path) -> Path:
    """Return a folder with names of tensors as on the hub, and the old config.json."""
    folder = respell(checkpoints("qwen2_5_vl"), tmp_path / "base", SPELLINGS["hub"])
    write_flat_config(folder)
    return folder


def expected_loss(model) -> torch.Tensor:
    """Return the summed loss of all rows, of transformers' model or of PEFT's."""
    return torch.stack([loss_of_transformers(model, row, QWEN_2_5) for row in ROWS]).sum()


@pytest.mark.parametrize("kind", [None, "qwen2_5_vl"])
def test_it_is_read_like_the_new_one(kind, base, checkpoints):
    """Some versions of transformers 4 wrote a model_type into vision_config, which is not the tower's."""
    raw = read_config_json(base)
    raw["vision_config"] |= {"model_type": kind} if kind else {}
    (base / CONFIG).write_text(json.dumps(raw))
    (old, family), (new, _) = (read_config(path, images=True) for path in (base, checkpoints("qwen2_5_vl")))
    assert family.has_images and type(old) is type(new)
    for part in ("text_config", "vision_config"):
        found, expected = (getattr(config, part).to_dict() for config in (old, new))
        names = expected.keys() - {"dtype", "model_type", "rope_parameters"}
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    raw["tie_word_embeddings"] = True
    (base / CONFIG).write_text(json.dumps(raw))
    tied, _ = read_config(base)
    assert tied.tie_word_embeddings and not is_tied_by_default(tied)
    rope, same = old.text_config.rope_parameters, new.text_config.rope_parameters
    assert all(rope[name] == same[name] for name in ("rope_type", "rope_theta", "mrope_section"))


@pytest.mark.parametrize(("train_type", "options"), [("dora", TOWER), *slow([("full", []), ("qlora", [])])])
def test_a_run_keeps_its_spelling(train_type, options, base, alpaca_file, one_rank, tmp_path):
    """PEFT and transformers load the result over it, with the loss of this program."""
    write_random_run(one_rank, tmp_path / "run", args_for(base, alpaca_file, train_type, *IMAGES, *options))
    ours = load_model(open_run(tmp_path / "run"), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        loss = ours(**padded(ROWS, of=QWEN_2_5).inputs())
    if train_type == "full":
        result = tmp_path / "run"
    else:
        result = tmp_path / "out"
        exported = ["--to", "merged", "--out", result, "--dtype", "float32"]
        assert export.main([*map(str, [tmp_path / "run", *exported])]) == 0
    models = [load_transformers_model(result, dtype=torch.float32)]
    if train_type == "dora":
        theirs = load_transformers_model(base, dtype=torch.float32)
        models.append(peft.PeftModel.from_pretrained(theirs, tmp_path / "run"))
    assert read_config_json(result) == read_config_json(base)
    with torch.no_grad():
        for model in models:
            torch.testing.assert_close(loss, expected_loss(model.eval()), rtol=1e-5, atol=0)


def test_it_is_expanded(base, tmp_path):
    """New blocks are written in its spelling; transformers computes the base's logits with them."""
    expanded = expand(base, tmp_path / "expanded", "--new_blocks", "1")
    config, _ = read_config(expanded)
    raw = read_config_json(expanded)
    assert raw["num_hidden_layers"] == config.text_config.num_hidden_layers == 4
    assert "text_config" not in raw and len(new_layers(config)) == 1
    with torch.no_grad():
        logits, expected = (
            load_transformers_model(folder, dtype=torch.float32).eval()(input_ids=IDS).logits
            for folder in (expanded, base)
        )
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
