"""Tokenizers that fail on a text: the message of each command names the right folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import block_expansion
import evaluate
import export
import generate
from data.encoding import encode
from data.reading import ReadingOptions
from data.tokenizing import tokenize_dataset
from files.names import BLOCKS
from files.tokenizer import compare_with_files, read_tokenizer
from options.errors import UserError
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import write_random_run
from tests.helpers.here import SINGLE_RANK
from tests.helpers.runs import make_job

FAILING = {
    "words": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1}, "unk_token": "<unk>"},
    "pieces": {"type": "WordPiece", "vocab": {"<s>": 0, "</s>": 1}, "unk_token": "<unk>",
               "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    "Unigram": {"type": "Unigram", "vocab": [["<s>", 0.0], ["</s>", 0.0]], "unk_id": None},
}  # fmt: skip


def write_failing_tokenizer(folder: Path, kind: str) -> Path:
    """Write a tokenizer into the folder that knows only BOS and EOS, and fails on any other text."""
    parts = dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    tokenizer_json = {"version": "1.0", "added_tokens": [], **parts, "model": FAILING[kind]}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    for name, text in (("tokenizer.json", tokenizer_json), ("tokenizer_config.json", described)):
        (folder / name).write_text(json.dumps(text))
    return folder


@pytest.mark.parametrize("kind", FAILING)
def test_the_message_names_the_folder_of_a_tokenizer_that_fails(kind, checkpoints, alpaca_file, tmp_path):
    folder = write_failing_tokenizer(shutil.copytree(checkpoints(), tmp_path / "model"), kind)
    tokenizer = read_tokenizer(folder, "here")
    for fails in (
        lambda: encode(tokenizer, ["Hi"], add_special_tokens=True),
        lambda: compare_with_files(folder, tokenizer),
        lambda: make_job(SINGLE_RANK, args_for(folder, alpaca_file, "qlora")),
    ):
        with pytest.raises(UserError, match=rf"^{re.escape(str(folder))}: its tokenizer fails \("):
            fails()


def test_the_message_names_the_folder_of_a_tokenizer_that_cannot_be_used(checkpoints, alpaca_file, tmp_path):
    folder = shutil.copytree(checkpoints(), tmp_path / "model")

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=rf"^{re.escape(str(folder))}: its tokenizer {words}"):
            tokenize_dataset(
                str(alpaca_file), ReadingOptions(read_tokenizer(folder, "here"), context_length=100)
            )

    path = folder / "tokenizer.json"
    tokenizer_json = json.loads(path.read_text())
    tokenizer_json["model"]["vocab"]["e"] = 2**31
    path.write_text(json.dumps(tokenizer_json))
    refused(f"returns the token id {2**31}, which is too large$")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": None}))
    refused("has no EOS token")


@pytest.mark.parametrize("moved", [False, True])
def test_commands_name_the_folder_of_a_tokenizer_that_fails(
    moved, checkpoints, alpaca_file, one_rank, tmp_path, capsys
):
    """The line names the RUN's base or --base_model, since these commands have no --model_name."""
    folder, run = shutil.copytree(checkpoints(), tmp_path / "base"), tmp_path / "run"
    write_random_run(one_rank, run, args_for(folder, alpaca_file, "qlora"))
    failing = write_failing_tokenizer(
        shutil.copytree(checkpoints(), tmp_path / "moved") if moved else folder, "words"
    )
    named = ["--base_model", failing] if moved else []
    capsys.readouterr()
    for command, *more in (
        (generate, "--prompt", "Hi"),
        (evaluate, "--dataset", alpaca_file),
        (export, "--to", "merged", "--out", tmp_path / "out"),
        (export, "--to", "adapter", "--out", tmp_path / "out"),
    ):
        assert command.main(list(map(str, [run, *more, *named]))) == 2
        warning, error = capsys.readouterr().err.splitlines()
        assert "has changed since training" in warning  # the files changed since
        assert error.startswith(f"error: {failing}: its tokenizer fails (")
    assert not (tmp_path / "out").exists()


def test_putting_blocks_back_names_a_tokenizer_that_fails(
    checkpoints, alpaca_file, one_rank, tmp_path, capsys
):
    expanded, run = tiny.save_expanded(checkpoints(), tmp_path / "pro"), tmp_path / "run"
    write_random_run(
        one_rank, run, args_for(expanded, alpaca_file, "llama_pro", "--llama_pro_save", "blocks")
    )
    write_failing_tokenizer(expanded, "words")
    capsys.readouterr()
    command = ["--model_name", expanded, "--blocks", run / BLOCKS, "--output_dir", tmp_path / "whole"]
    assert block_expansion.main(list(map(str, command))) == 2
    assert capsys.readouterr().err.startswith(f"error: {expanded}: its tokenizer fails (")
    assert not (tmp_path / "whole").exists()
