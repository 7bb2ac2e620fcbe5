"""The vision tower of a wrapper that is trained on text: damaged files are refused before the training."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import block_expansion
from models.registry import open_weights, read_config
from models.unused_parts import absent_parts
from options.errors import UserError
from tests.helpers.bnb_checkpoints import make_single_rank_job, pack_like_the_hub
from tests.helpers.spellings import SPELLINGS, is_of_a_tower, respell
from training.planned_model import open_planned_model
from training.preflight import remarks_on_model

BIAS = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"  # on the hub


@pytest.fixture
def changed(checkpoints, tmp_path):
    """changed(change): the folder of a wrapper in the hub's spelling, {name: tensor} of a file changed."""

    def make(change):
        folder = respell(checkpoints("gemma3_wrapper"), tmp_path / "model", SPELLINGS["hub"])
        tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
        for path in folder.glob("model*"):
            path.unlink()
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def halve(tensors) -> None:
    tensors[BIAS] = tensors[BIAS][:3].clone()


@pytest.mark.parametrize("open_model", [lambda folder: open_weights(folder, *read_config(folder)),
                                        lambda folder: open_planned_model(str(folder))])  # fmt: skip
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(BIAS), "tensor model.vision_tower.*layers.0.mlp.fc1.bias is missing"),
        (halve, rf"model.safetensors: {BIAS} has shape \[3\], but config.json says \["),
    ],
)
def test_a_damaged_tower(change, words, open_model, changed):
    """transformers warns of the first and fails at the second."""
    folder = changed(change)
    with pytest.raises(UserError, match=words):
        open_model(folder)


def test_a_plan_of_a_packed_tower(checkpoints, tmp_path):
    """Headers do not have the shapes of its packed weights."""
    pack_like_the_hub(checkpoints("gemma3_wrapper"), tmp_path / "4bit")
    assert open_planned_model(str(tmp_path / "4bit")).files.prequantized


def test_a_text_model_without_its_tower(changed):
    """It is trained, and a line says what the result lacks."""

    def remove(tensors) -> None:
        for name in [name for name in tensors if is_of_a_tower(name)]:
            del tensors[name]

    folder = changed(remove)
    config, family = read_config(folder)
    absent = absent_parts(family, open_weights(folder, config, family)[0])
    assert absent == ["vision_tower", "multi_modal_projector"]
    line = f"{folder}: the weights lack vision_tower and multi_modal_projector, which text does not need;"
    assert any(remark.startswith(line) for remark in remarks_on_model(config, folder, False, absent))
    with pytest.raises(UserError, match=r"tensor model.vision_tower.* is missing from the weights"):
        open_weights(folder, *read_config(folder, images=True))


def test_a_tower_that_is_built(checkpoints):
    """With images its tensors are parameters: none is apart, and none is absent."""
    folder = checkpoints("gemma3_wrapper")
    config, family = read_config(folder, images=True)
    files = open_weights(folder, config, family)[0]
    assert files.apart is None and absent_parts(family, files) == []


def test_nan_in_the_tower(changed, alpaca_file, tmp_path, capsys):
    """It ends what copies the tower, at the start. An adapter over it is of use."""
    folder = changed(lambda tensors: tensors[BIAS].fill_(torch.nan))
    words = f"model.safetensors: {BIAS} holds NaN"
    with pytest.raises(UserError, match=words):
        make_single_rank_job(folder, alpaca_file, "--train_type", "full")
    make_single_rank_job(folder, alpaca_file, "--train_type", "lora")
    argv = ["--model_name", str(folder), "--output_dir", str(tmp_path / "out"), "--new_blocks", "1"]
    assert block_expansion.main(argv) == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
