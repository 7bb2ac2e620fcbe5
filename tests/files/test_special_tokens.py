"""files/special_tokens.py: an EOS that no file names, and tokens that only transformers adds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.reading import ReadingOptions
from data.tokenizing import tokenize_dataset
from files.tokenizer import compare_with_files, read_tokenizer
from options.errors import UserError
from tests.helpers.adapters import args_for
from tests.helpers.here import SINGLE_RANK
from tests.helpers.runs import make_job
from tests.helpers.small_tokenizers import BYTES

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tokenizer_folder(folder: Path, model_type: str, tokens: tuple[str, ...], **files: dict) -> Path:
    """Write a tokenizer folder whose tokenizer.json has ids 0 to 255 for bytes and 256 on for `tokens`.

    <unk> replaces one byte. files: {name of a JSON file without its suffix: object}.
    """
    folder.mkdir(exist_ok=True)
    tokenizer_json = json.loads(BYTES.backend_tokenizer.to_str())
    vocabulary = {token: i for token, i in tokenizer_json["model"]["vocab"].items() if i < 255}
    tokenizer_json["model"]["vocab"] = vocabulary | {"<unk>": 255}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer_json["added_tokens"] = [
        {"id": 256 + i, "content": token, "special": True, **flags} for i, token in enumerate(tokens)
    ]
    tokenizer_json["post_processor"] = None
    for name, value in ({"tokenizer": tokenizer_json, "config": {"model_type": model_type}} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("tokenizer_class", [{}, {"tokenizer_class": "Qwen2Tokenizer"}])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe"])
def test_rows_do_not_end_in_a_token_that_no_file_names(model_type, tokenizer_class, tmp_path):
    """Qwen's class defaults to <|endoftext|>; a chat model was trained with <|im_end|>."""
    folder = write_tokenizer_folder(tmp_path / "qwen", model_type, CHATML, tokenizer_config=tokenizer_class)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 256
    with pytest.raises(UserError, match=r"and transformers' Qwen2Tokenizer would take '<\|endoftext\|>'"):
        read_tokenizer(folder, "here")
    rows, eos = tmp_path / "rows.jsonl", {"eos_token": "<|im_end|>"}
    rows.write_text('{"text": "Paris"}\n')
    for files in (
        {"tokenizer_config": tokenizer_class | eos},
        {"tokenizer_config": tokenizer_class, "special_tokens_map": eos},
    ):
        write_tokenizer_folder(folder, model_type, CHATML, **files)
        tokenizer = read_tokenizer(folder, "here")
        assert (
            tokenize_dataset(str(rows), ReadingOptions(tokenizer, samples=1, context_length=100)).tokens[-1]
            == 258
        )
        assert not any("this id" in remark for remark in compare_with_files(folder, tokenizer).remarks)


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
# (model_type, tokenizer_config.json), with an EOS that tokenizer.json, with Llama 3's tokens, lacks
INVENTED = {
    "Qwen's default": ("qwen2", {"eos_token": "<|endoftext|>"}),
    "Gemma's default": (
        "gemma2", {"tokenizer_class": "GemmaTokenizer", "eos_token": "<eos>", "pad_token": "<eos>"}),
    "a token of one's own": ("llama", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}),
}  # fmt: skip


@pytest.mark.parametrize("case", INVENTED)
def test_an_eos_that_no_file_has(case, tmp_path):
    """It is refused, since the model has no trained embedding for its new id.

    If tokenizer_config.json gives it the id, there is only a remark.
    """
    model_type, config = INVENTED[case]
    folder = write_tokenizer_folder(tmp_path / "model", model_type, LLAMA3, tokenizer_config=config)
    tokenizer, eos = read_tokenizer(folder, "here"), config["eos_token"]
    number = tokenizer.eos_token_id
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(eos) is None and number > 258
    words = f"{folder}: the EOS token {eos!r} has the id {number} only in transformers'"
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        compare_with_files(folder, tokenizer)
    known = {str(256 + i): {"content": token, "special": True} for i, token in enumerate(LLAMA3)}
    listed = {"content": eos, "special": True}

    def listed_with(i: int) -> PreTrainedTokenizerFast:
        decoder = {"added_tokens_decoder": known | {str(i): listed}}
        write_tokenizer_folder(folder, model_type, LLAMA3, tokenizer_config=config | decoder)
        return read_tokenizer(folder, "here")

    remarks = compare_with_files(folder, listed_with(259)).remarks
    assert any(f"tokenizer.json lacks {eos!r} (eos_token" in remark for remark in remarks)
    with pytest.raises(UserError, match="the id 259 only in "):  # transformers numbers them in their order
        compare_with_files(folder, listed_with(266))


def test_an_eos_that_no_file_has_is_refused_before_training(checkpoints, alpaca_file, tmp_path):
    folder = shutil.copytree(checkpoints(), tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|end|>"}))
    with pytest.raises(UserError, match=r"the EOS token '<\|end\|>' has the id 258 only in transformers'"):
        make_job(SINGLE_RANK, args_for(folder, alpaca_file, "qlora"))


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gemma2", {"tokenizer_class": "GemmaTokenizer"}),
        ("qwen3", {"tokenizer_class": "Qwen2Tokenizer"}),
        ("llama", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "bos_token": "[B]"}),
    ],
)
def test_tokens_that_only_transformers_adds_are_named(model_type, config, tmp_path):
    """Each is named with its id; with a tokenizer.json that has them all there is no remark."""
    config = config | {"eos_token": "<|eot_id|>"}
    folder = write_tokenizer_folder(tmp_path / "model", model_type, LLAMA3, tokenizer_config=config)
    tokenizer = read_tokenizer(folder, "here")
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    new = {token: i for token, i in tokenizer.get_vocab().items() if file.token_to_id(token) is None}
    differences = compare_with_files(folder, tokenizer)
    (remark,) = (remark for remark in differences.remarks if "this id" in remark)
    found = re.findall(r"'([^']+)' \([a-z_, ]*id (\d+)\)", remark)
    assert new and {token: int(i) for token, i in found} == new
    (folder / "tokenizer.json").write_text(differences.files["tokenizer.json"])
    assert not any(
        "this id" in remark for remark in compare_with_files(folder, read_tokenizer(folder, "here")).remarks
    )


def test_a_bos_that_no_file_names_gets_a_remark(tmp_path):
    for bos in ({}, {"bos_token": "<bos>"}):
        config = {"tokenizer_class": "GemmaTokenizer", "eos_token": "<eos>"} | bos
        folder = write_tokenizer_folder(
            tmp_path / "model",
            "gemma2",
            ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"),
            tokenizer_config=config,
        )
        remarks = compare_with_files(folder, read_tokenizer(folder, "here")).remarks
        remark = "tokenizer: no file says bos_token; it is GemmaTokenizer's default, '<bos>'"
        assert (remark in remarks) == (not bos)
