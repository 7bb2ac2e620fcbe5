"""Errors of block_expansion.py: status 2, one line on stderr, nothing written."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import block_expansion
from files.names import BLOCKS
from models.llama_pro import NEW_LAYERS
from tests.helpers.bnb_checkpoints import pack_like_the_hub
from tests.helpers.expansion import all_tensors, edit_config, expand, read_config_json


@pytest.fixture
def refused(checkpoints, tmp_path, capsys):
    """refused(*words, **options): block_expansion.py prints one line with the words and writes nothing."""

    def run(*words: str, **options) -> None:
        good = {"model_name": checkpoints(), "output_dir": tmp_path / "out"}
        given = {k: v for k, v in (good | options).items() if v is not None}
        before = sorted(tmp_path.rglob("*"))
        status = block_expansion.main([f"--{name}={value}" for name, value in given.items()])
        shown = capsys.readouterr()
        assert status == 2 and shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
        assert [word for word in words if word not in shown.err] == [], shown.err
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, ["--new_blocks", "--expansion_rate", "--after", "--blocks", "--help"]),
        ({"new_blocks": 2, "after": 1}, ["give one of"]),
        ({"new_blocks": 0}, ["--new_blocks 0", "positive"]),
        ({"new_blocks": -3}, ["--new_blocks -3", "positive"]),
        ({"new_blocks": "two"}, ["--new_blocks", "'two' is not a whole number"]),
        ({"expansion_rate": 0}, ["--expansion_rate 0", "above 0"]),
        ({"expansion_rate": "inf"}, ["--expansion_rate inf", "finite"]),
        ({"expansion_rate": "nan"}, ["--expansion_rate: 'nan'", "is not a number"]),
        ({"new_blocks": 10**9}, ["3 layers", f"{10**9:,} new ones", "at most 10,000"]),
        ({"expansion_rate": 1e308}, ["10,000 new ones", "at most 10,000"]),
        ({"after": ",".join(["1"] * 9_998)}, ["9,998 new ones", "at most 10,000"]),
        ({"after": "0,3"}, ["--after 3", "the layers 0 to 2"]),
        ({"after": -1}, ["--after -1", "the layers 0 to 2"]),
        ({"after": "0,,1"}, ["--after", "'' is not the number of a layer"]),
        ({"new_block": 1}, ["unknown option --new_block", "did you mean --new_blocks?"]),
        ({"new_blocks": 1, "model_name": None}, ["--model_name is missing"]),
        ({"new_blocks": 1, "output_dir": None}, ["--output_dir is missing"]),
        (
            {"new_blocks": 1, "model_name": "no/such/folder"},
            ["--model_name no/such/folder", "no such folder"],
        ),
        ({"blocks": "none.safetensors"}, [f"no {NEW_LAYERS}", "no expanded model"]),
    ],
)
def test_bad_options(refused, options, words):
    refused(*words, **options)


def spoil(change):
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model-00002-of-00004.safetensors")
        change(tensors)
        save_file(tensors, folder / "model-00002-of-00004.safetensors")

    return damage


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
        (lambda folder: [p.unlink() for p in folder.glob("*safetensors*")], ["no weights"]),
        (lambda folder: edit_config(folder, model_type="gpt2"), ["'gpt2' is unknown"]),
        (lambda folder: edit_config(folder, num_hidden_layers=4), ["model.layers.3.", "is missing"]),
        (
            lambda folder: edit_config(folder, num_hidden_layers=2),
            ["model.layers.2.", "belongs to no parameter of this model"],
        ),
        (
            lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}),
            ["quantized already"],
        ),
        (lambda folder: edit_config(folder, llama_pro_new_layers=[1]), ["expanded already", "base model"]),
        (spoil(lambda tensors: tensors.update(more=torch.zeros(2))), ["more", "belongs to no parameter of"]),
    ],
)
def test_bad_models(refused, checkpoints, tmp_path, damage, words):
    folder = shutil.copytree(checkpoints(), tmp_path / "model")
    damage(folder)
    refused(str(folder), *words, model_name=folder, new_blocks=1)


@pytest.mark.parametrize("place", ["text_config", None])
def test_packed_files(place, refused, checkpoints, tmp_path):
    """Also if no, or only the text model's config says that they are packed: copies would lack the scales."""
    folder = tmp_path / "4bit"
    pack_like_the_hub(checkpoints("gemma3_wrapper"), folder)
    config = read_config_json(folder)
    packing = {"quantization_config": config["quantization_config"]} if place else {}
    edit_config(folder, quantization_config=None, text_config=config["text_config"] | packing)
    refused(f"{folder}: is quantized; new blocks need the original", model_name=folder, new_blocks=1)


def test_bad_output_folders(refused, checkpoints, tmp_path):
    refused("holds a run already", new_blocks=1, output_dir=checkpoints())
    refused("is the folder of --model_name", new_blocks=1, output_dir=checkpoints(), overwrite="true")
    (tmp_path / "file").write_text("kept")
    refused("cannot be written", new_blocks=1, output_dir=tmp_path / "file" / "below")


def test_a_missing_tokenizer_is_reported(checkpoints, tmp_path, capsys):
    base = shutil.copytree(checkpoints(), tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    expand(base, tmp_path / "out", "--new_blocks", 1)
    assert f"no tokenizer in {base}" in capsys.readouterr().out


def test_bad_blocks(refused, checkpoints, tmp_path):
    base = checkpoints("llama_bias_pro")
    path, new = tmp_path / BLOCKS, {}
    new |= {
        n: t for n, t in all_tensors(base).items() if n.startswith(("model.layers.1.", "model.layers.4."))
    }
    norm = "model.layers.4.input_layernorm.weight"

    def refuse(*words, tensors=new, layers="[1, 4]"):
        save_file(tensors, path, metadata={NEW_LAYERS: layers} if layers else None)
        refused(f"--blocks {path}", *words, model_name=base, blocks=path)

    refused("no such file", model_name=base, blocks=path)
    refuse("not a file of new blocks", layers=None)
    header = b'{"__metadata__": null}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused("not a file of new blocks", model_name=base, blocks=path)
    refuse("new layers [1, 3]", "[1, 4]", layers="[1, 3]")
    refuse(f"{norm} is missing", tensors={n: t for n, t in new.items() if n != norm})
    refuse("model.norm.weight is in no new layer", tensors=new | {"model.norm.weight": torch.ones(64)})
    refuse(norm, "shape [65]", "[64]", tensors=new | {norm: torch.ones(65)})
    path.write_text("x")
    refused(str(path), "not a safetensors file", model_name=base, blocks=path)
