"""files/tokenizer.py: folders that do not say enough."""

from __future__ import annotations

import json

import pytest

from files.tokenizer import read_tokenizer
from options.errors import UserError
from tests.helpers.small_tokenizers import BYTES

VOCABULARY = {"vocab.json": '{"a": 0, "</s>": 1}', "merges.txt": "#version: 0.2\n"}
SPM = "tokenizer.model"
# what the folder has instead of tokenizer.json and tokenizer_config.json, what is said
HALF_KNOWN = {
    "nothing": ({}, "there is no tokenizer.json)"),
    "SentencePiece's model": ({SPM: "x"}, f"there is no tokenizer.json, and {SPM} alone does not say how to split text)"),
    "SentencePiece's model, and a config": ({SPM: "x", "tokenizer_config.json": "{}"}, f"{SPM} alone does not say"),
    "SentencePiece's model, and special tokens": ({SPM: "x", "special_tokens_map.json": "{}"}, f"{SPM} alone does not say"),
    "Mistral's own file": ({"tekken.json": "{}"}, "tekken.json alone does not say"),
    "a vocabulary": (VOCABULARY, "vocab.json alone does not say"),
    "a vocabulary without merges": ({"vocab.json": "{}", "tokenizer_config.json": "{}"}, "vocab.json alone does not"),
    "tokenizer.json alone": (
        {"tokenizer.json": BYTES.backend_tokenizer.to_str()},
        "there is no tokenizer_config.json, so what its BOS, EOS and chat template are is unknown)"),
    "tokenizer.json and a template": (
        {"tokenizer.json": BYTES.backend_tokenizer.to_str(), "chat_template.jinja": "{{ bos_token }}"},
        "there is no tokenizer_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", HALF_KNOWN)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_a_folder_that_does_not_say_enough(case, model_type, tmp_path):
    files, words = HALF_KNOWN[case]
    for name, text in ({"config.json": json.dumps({"model_type": model_type})} | files).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"^here: no usable tokenizer ") as raised:
        read_tokenizer(tmp_path, "here")
    assert words in str(raised.value)
