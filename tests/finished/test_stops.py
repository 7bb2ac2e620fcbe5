"""Tokens that end an answer: a base learns ChatML's end of turn, and every command and result knows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

import block_expansion
import export
from data.formats import RenderContext
from data.stop_ids import collect_stop_ids, make_generation_config
from files.names import BLOCKS, GENERATION_CONFIG
from finished.finished_run import find_stop_ids, load_tokenizer, open_run
from finished.generation import make_template
from models.registry import read_config
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import write_random_run
from tests.helpers.runs import make_job
from tests.helpers.small_tokenizers import BYTES
from tests.helpers.tiny import save_expanded

LEARNED = {"</s>", "<|im_end|>"}


def named(ids: list[int], tokenizer) -> set[str]:
    """Return the tokens without the tiny config's own EOS, 2, which is a byte of its tokenizer."""
    return {tokenizer.decode([i]) for i in ids if i != 2}


def stops_in_training(origin, argv: list) -> list[int]:
    return [*make_job(origin, argv).evaluation.stop_ids]


def test_every_command_knows_them(chat_run, one_rank):
    """Training's samples, generate.py, evaluate.py and export.py."""
    run = open_run(chat_run)
    tokenizer = load_tokenizer(run)
    assert named(find_stop_ids(run, tokenizer), tokenizer) == LEARNED
    assert sorted(make_template(run, "auto").stop_ids) == find_stop_ids(run, tokenizer)
    argv = args_for(run.base, chat_run.parent / "rows.jsonl", "bnb_dora")
    assert one_rank(stops_in_training, argv) == [find_stop_ids(run, tokenizer)]


@pytest.mark.parametrize("to", ["merged", "adapter"])
def test_they_are_written_into_an_export(to, chat_run, tmp_path):
    run = open_run(chat_run)
    stop_ids = find_stop_ids(run, load_tokenizer(run))
    assert (
        json.loads((chat_run / GENERATION_CONFIG).read_text())["eos_token_id"] == stop_ids
    )  # beside the adapter, too
    assert export.main([str(chat_run), "--to", to, "--out", str(tmp_path / "out")]) == 0
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == stop_ids
    if to == "merged":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.generation_config.eos_token_id == stop_ids


def chat_base(base: Path, chat_run: Path, folder: Path) -> Path:
    """Copy a model and give it the tokenizer of `chat_run`'s base."""
    copy = shutil.copytree(base, folder)
    for path in (chat_run.parent / "model").iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copyfile(path, copy / path.name)
    return copy


def test_they_are_written_into_a_whole_model(chat_run, checkpoints, one_rank, tmp_path):
    base = chat_base(checkpoints(), chat_run, tmp_path / "base")
    write_random_run(one_rank, tmp_path / "run", args_for(base, chat_run.parent / "rows.jsonl", "full"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert named(model.generation_config.eos_token_id, load_tokenizer(open_run(tmp_path / "run"))) == LEARNED


def test_new_blocks_take_them_along(chat_run, checkpoints, one_rank, tmp_path):
    base = save_expanded(chat_base(checkpoints(), chat_run, tmp_path / "base"), tmp_path / "expanded")
    more = ["--llama_pro_save", "blocks"]
    write_random_run(
        one_rank, tmp_path / "run", args_for(base, chat_run.parent / "rows.jsonl", "llama_pro", *more)
    )
    options = [
        "--model_name",
        base,
        "--blocks",
        tmp_path / "run" / BLOCKS,
        "--output_dir",
        tmp_path / "whole",
    ]
    assert block_expansion.main(list(map(str, options))) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert named(model.generation_config.eos_token_id, load_tokenizer(open_run(tmp_path / "run"))) == LEARNED


def test_a_base_that_says_them_already_is_copied(checkpoints, tmp_path):
    """Other settings of generation_config.json stay.

    Settings that transformers would derive from config.json are written.
    """
    config, _ = read_config(checkpoints())
    stop_ids = collect_stop_ids(checkpoints(), config.eos_token_id, "alpaca", RenderContext(BYTES))
    (tmp_path / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": stop_ids, "temperature": 0.6}))
    assert make_generation_config(tmp_path, config, stop_ids) == {}
    made = json.loads(make_generation_config(tmp_path, config, [*stop_ids, 300])[GENERATION_CONFIG])
    assert made == {"eos_token_id": [*stop_ids, 300], "temperature": 0.6}
    (tmp_path / GENERATION_CONFIG).unlink()
    made = json.loads(make_generation_config(tmp_path, config, [7])[GENERATION_CONFIG])
    assert made == {"bos_token_id": config.bos_token_id, "eos_token_id": [7]}
