"""Model types that are not built here: the line says why, and what helps."""

from __future__ import annotations

import json
import re

import pytest
import transformers
from transformers import CONFIG_MAPPING

from models.registry import FAMILIES, read_config
from models.unsupported import find_lacking_part, nearest_family
from options.errors import UserError

INSTALLED = transformers.__version__


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"transformers_version": "5.999.0.dev0"}, "5.999.0 wrote the file.* 'transformers>=5.999.0'"),
        ({"transformers_version": "4.1"}, "though 4.1 wrote the file"),
        ({"transformers_version": INSTALLED}, f"though {INSTALLED} wrote the file"),
        ({"transformers_version": "x" * 5000}, "does not name the version"),
        ({}, "does not name the version"),
        ({"auto_map": {"AutoConfig": "x.Y"}, "transformers_version": "9.0"}, "own repository .*never run"),
    ],
)
def test_types_that_transformers_does_not_know(values, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense", **values}))
    line = rf"'nonsense' is unknown to the installed transformers {INSTALLED}.*{words}.*known here: llama"
    with pytest.raises(UserError, match=line):
        read_config(tmp_path)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_of_a_type_that_transformers_does_not_know(part, tmp_path):
    """Newer text models come in known wrappers, as Ministral 3 in mistral3."""
    values = {"model_type": "mistral3", "transformers_version": "5.999.0", part: {"model_type": "nonsense"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    line = rf"{part}: model_type 'nonsense' is unknown .*{INSTALLED}; 5.999.0 wrote .*transformers>=5.999.0"
    with pytest.raises(UserError, match=line):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "reason", "nearest"),
    [
        ("qwen3_next", "has linear attention", "qwen3_moe"),
        ("minimax", "has linear attention", "llama"),
        ("mamba", "has a state space", "llama"),
        ("falcon_h1", "has a state space", "llama"),
        ("lfm2", "has convolutions", "llama"),
        ("t5", "has an encoder", "llama"),
        ("mllama", "has cross-attention", "llama"),
        ("bert", "is no causal decoder", "llama"),
        ("qwen3_vl", "has inputs other than text", "qwen3"),
    ],
)
def test_types_of_another_kind(model_type, reason, nearest, tmp_path):
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"'{model_type}' {reason}; only causal.* the nearest is {nearest}"):
        read_config(tmp_path)


@pytest.mark.parametrize("model_type", ["gpt2", "mistral4"])  # the latter is listed among wrappers alone
def test_a_plain_decoder_that_is_not_listed(model_type, tmp_path):
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"`python -m tools.try_family {model_type}` shows")):
        read_config(tmp_path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_family_is_of_another_kind(model_type):
    config = CONFIG_MAPPING[model_type]()
    assert find_lacking_part(config) is None and nearest_family(config, list(FAMILIES)) == model_type
