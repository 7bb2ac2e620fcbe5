"""Models in formats that are not read: the error names the format, and the original if it is known."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from files.model_folder import find_model, list_weight_files
from files.names import CONFIG
from files.quantized_releases import suggest_original
from models.registry import read_config
from options.errors import UserError
from tests.helpers.bnb_checkpoints import QLORA, make_single_rank_job, set_quantization_config
from tests.helpers.expansion import all_tensors, edit_config, read_config_json
from tests.helpers.hub_cache import FIRST, add_to_hub_cache

CARD = "---\nlicense: mit\n{}\n---\n# A model\nbase_model: not/this\n"


@pytest.fixture
def folder(checkpoints, tmp_path):
    return shutil.copytree(checkpoints(), tmp_path / "Tiny-1B-AWQ")


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8 with scales of blocks"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors, pack-quant",
        ),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"group_size": 64, "bits": 4}, "mlx"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes 8 bit"),
        ({"quant_method": "a\nb"}, r"'a\\nb'"),
    ],
)
def test_formats_named_by_the_config(quantization, kind, folder, alpaca_file):
    set_quantization_config(folder, **quantization)
    with pytest.raises(
        UserError, match=rf"quantized already \({kind}.*take the original, by the name Tiny-1B$"
    ):
        make_single_rank_job(folder, alpaca_file, *QLORA)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("part", ["whole", "text_config"])
def test_formats_named_in_any_part_of_the_config(part, key, checkpoints, tmp_path):
    """transformers reads text_config, too; older releases in compressed-tensors have another key."""
    folder = shutil.copytree(checkpoints("gemma3_wrapper"), tmp_path / "Tiny-1B-W4A16")
    values = {key: {"quant_method": "compressed-tensors", "format": "pack-quantized"}}
    if part == "text_config":
        values = {part: read_config_json(folder)[part] | values}
    edit_config(folder, **values)
    with pytest.raises(UserError, match=r"\(compressed-tensors, pack-quantized\).*by the name Tiny-1B$"):
        read_config(folder)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("apertus", "'apertus' is unknown; known: llama"),
        ("qwen3_5", "'qwen3_5' has linear attention"),
        ("nonsense", "'nonsense' is unknown to the installed transformers"),
    ],
)
def test_a_type_that_is_not_trained_either(model_type, words, tmp_path):
    """Both are said: a type may be added, and the user would take the original for it."""
    folder = tmp_path / "Tiny-1B-AWQ"
    folder.mkdir()
    (folder / CONFIG).write_text(
        json.dumps({"model_type": model_type, "quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(UserError, match=rf"{words}.*; besides, .*quantized already \(awq\).*name Tiny-1B$"):
        read_config(folder)


@pytest.mark.parametrize(
    ("file", "kind"), [("quantize_config.json", "gptq"), ("hf_quant_config.json", "modelopt")]
)
def test_formats_named_by_another_file(file, kind, folder, alpaca_file):
    (folder / file).write_text("{}")
    with pytest.raises(UserError, match=rf"quantized already \({kind}\)"):
        make_single_rank_job(folder, alpaca_file, *QLORA)


def test_weights_of_which_no_file_says_that_they_are_quantized(folder, alpaca_file):
    tensors = {name: t.to(torch.float8_e4m3fn) for name, t in all_tensors(folder).items()}
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"stored as F8_E4M3; .*take the original, by the name Tiny-1B$"):
        make_single_rank_job(folder, alpaca_file, *QLORA)


@pytest.mark.parametrize("has_config", [True, False])
def test_gguf_files(has_config, folder):
    """Given as a folder, with or without a config.json, or as a file."""
    for path in folder.glob("model*"):
        path.unlink()
    file = folder / "tiny.Q4_K_M.gguf"
    file.touch()
    if not has_config:
        (folder / CONFIG).unlink()
    with pytest.raises(UserError, match=r"quantized already \(GGUF\).*by the name Tiny-1B$"):
        list_weight_files(find_model(str(folder)))
    with pytest.raises(UserError, match=r"quantized already \(GGUF\).*by the name Tiny-1B$"):
        find_model(str(file))


def test_a_hub_repository_of_gguf_files(folder, tmp_path, monkeypatch):
    """Its files are not downloaded; its name and its card say what it is."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (folder / CONFIG).unlink()
    (folder / "README.md").write_text(CARD.format("base_model: own/Tiny-1B"))
    add_to_hub_cache(tmp_path / "hub", "me/Tiny-1B-GGUF", folder, FIRST, "main")
    with pytest.raises(
        UserError, match=r"quantized already \(GGUF\).*take own/Tiny-1B, which README.md names"
    ):
        find_model("me/Tiny-1B-GGUF")


def test_a_folder_of_weights_beside_gguf_files_is_no_release_of_them(folder):
    (folder / "tiny.gguf").touch()
    assert list_weight_files(find_model(str(folder)))


@pytest.mark.parametrize(
    ("front", "named", "advice"),
    [
        ("base_model: own/Tiny-1B", None, "take own/Tiny-1B, which README.md names as the original"),
        ("base_model:\n- 'own/Tiny-1B'\n- b/c", None, "take own/Tiny-1B, which README.md names"),
        ("base_model: [own/Tiny-1B]", None, "take own/Tiny-1B, which README.md names"),
        (
            "base_model: own/Tiny-1B\nbase_model_relation: finetune\r",
            None,
            "take own/Tiny-1B, which README",
        ),
        ("base_model:\n  - own/tiny-1b # x/y\ntags:\n- x/y", None, "take own/tiny-1b, which README.md names"),
        ("base_model: https://x.y/z/w", "own/Tiny-1B", "take own/Tiny-1B, which config.json names as the"),
        (
            "base_model: own/Other\nbase_model_relation: quantized",
            None,
            "take own/Other, which README.md names",
        ),
        # Tuned from it, or merged of it: not the original.
        ("base_model: own/Base\nbase_model_relation: finetune", "own/Base", "take the original, by the name"),
        ("base_model: own/Base", "own/Base", "take the original, by the name Tiny-1B"),
        (
            "base_model: [own/A, own/B]\nbase_model_relation: quantized",
            None,
            "take the original, by the name",
        ),
        ("base_model:\nlicense: x/Tiny-1B", None, "take the original, by the name Tiny-1B"),
        ("", "/home/me/Tiny", "take the original, by the name Tiny-1B"),
        ("base_model: ../../x", "../..\n/x", "take the original, by the name Tiny-1B"),
        ("base_model: me/Tiny-1B-GPTQ-Int4", None, "take the original, by the name Tiny-1B"),  # itself
        ("base_model: x/Tiny-1B-AWQ\nbase_model_relation: quantized", None, "take the original, by the name"),
    ],
)
def test_the_original_of_a_hub_repository(front, named, advice, folder, tmp_path):
    edit_config(folder, _name_or_path=named)
    for newline in ("\n", "\r\n"):
        (folder / "README.md").write_text(CARD.format(front), newline=newline)
        found = add_to_hub_cache(tmp_path / repr(newline), "me/Tiny-1B-GPTQ-Int4", folder, FIRST)
        assert suggest_original(found).startswith(advice)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("Llama-3.3-70B-Instruct-FP8-dynamic", "Llama-3.3-70B-Instruct"),
        ("Qwen3-8B-quantized.w4a16", "Qwen3-8B"),
        ("Mistral-7B-v0.1-GGUF", "Mistral-7B-v0.1"),
        ("gemma-3-1b-it-mlx-4bit", "gemma-3-1b-it"),
        ("phi-4-NVFP4", "phi-4"),
        ("Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "Llama-3.2-1B-Instruct"),
        ("gemma-3-1b-it-qat-q4_0-gguf", "gemma-3-1b-it"),
    ],
)
def test_usual_endings_of_names(name, plain, tmp_path):
    assert suggest_original(tmp_path / name) == f"take the original, by the name {plain}"


@pytest.mark.parametrize("name", ["gpt-oss-20b", "own/Ministral-3-3B-Base-2512"])
def test_a_name_without_an_ending(name, tmp_path):
    """Ministral 3's fp8 release names the base that its original was tuned from, without a relation."""
    folder = tmp_path / "Ministral-3-3B-Instruct-2512"
    folder.mkdir()
    (folder / "README.md").write_text(CARD.format(f"base_model:\n- {name}"))
    assert suggest_original(folder) == "take the model that it was made from"
