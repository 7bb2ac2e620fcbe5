"""A run with --chat_template: its folder, exports and commands have the template and its tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import block_expansion
import export
import generate
import train
from benchmarks.make_checkpoint import byte_tokenizer
from data.template_choice import use_template
from files.output_folder import clear_output
from options.train import parse
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.chat_templates import PLAIN_CHATML
from tests.helpers.finished_runs import write_random_run
from tests.helpers.here import SINGLE_RANK
from tests.helpers.runs import make_job

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
MARKERS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base with room for tokens, and with templates that must not come back."""
    folder = tiny.save_checkpoint("llama", tmp_path_factory.mktemp("base") / "base")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def run(base, rows, one_rank, tmp_path_factory) -> Path:
    """A RUN whose template was in a file, which is gone."""
    folder = tmp_path_factory.mktemp("run")
    file = folder / "own.jinja"
    file.write_text(PLAIN_CHATML)
    args = args_for(base, rows, "bnb_dora", "--chat_template", file)
    write_random_run(one_rank, folder / "run", args)
    file.unlink()
    return folder / "run"


def official_ids(add_generation_prompt: bool = False) -> list[int]:
    """The ids of TURNS by transformers, with the markers as the first ids after the vocabulary."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(MARKERS, special_tokens=True)
    turns = TURNS[:1] if add_generation_prompt else TURNS
    return tokenizer.apply_chat_template(
        turns, chat_template=PLAIN_CHATML, add_generation_prompt=add_generation_prompt
    )["input_ids"]


def saved_ids(folder: Path, **options) -> list[int]:
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(TURNS, **options)["input_ids"]


def test_a_run_s_folder_has_the_tokenizer(run, base, rows):
    """The training rows, the folder of the adapter and the repeated run have the same tokens."""
    assert saved_ids(run) == saved_ids(run, tools=[{}]) == official_ids()
    config, _ = parse(["--config", str(run / "config.yaml")])
    assert config.chat_template == PLAIN_CHATML
    again = make_job(type("R", (), {"world": 1}), ["--config", run / "config.yaml"])
    assert again.rows.tokens.tolist() == official_ids() and again.config.chat_template == PLAIN_CHATML
    assert again.read_tokenizer().convert_tokens_to_ids(MARKERS) == [258, 259]
    settings = json.loads((run / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [257, 259]


def test_generate_asks_in_the_template(run, capsys):
    asked = ["--prompt", "Hi", "--json", "--max_new_tokens", "2", "--compare", "false"]
    assert generate.main([str(run), *asked]) == 0
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads(capsys.readouterr().out)["rendered"] == text


@pytest.mark.parametrize("to", ["adapter", "merged", "gguf-ready"])
def test_exports_have_the_tokenizer(to, run, tmp_path, capsys):
    assert export.main([str(run), "--to", to, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "tokenizer:" not in shown, "the new tokens are no fault of the base's files"
    assert saved_ids(tmp_path / "out") == saved_ids(tmp_path / "out", tools=[{}]) == official_ids()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == PLAIN_CHATML
    assert not (tmp_path / "out" / "additional_chat_templates").exists()


def test_a_whole_model_has_the_tokenizer(base, rows, one_rank, tmp_path):
    write_random_run(one_rank, tmp_path / "run", args_for(base, rows, "full", "--chat_template", "chatml"))
    expected = byte_tokenizer()
    use_template(expected, "chatml", 300)
    assert saved_ids(tmp_path / "run") == expected.apply_chat_template(TURNS)["input_ids"] == official_ids()
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == expected.chat_template
    clear_output(tmp_path / "run")  # an overwriting run may have no template
    assert not any((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_new_blocks_have_the_tokenizer(base, rows, one_rank, tmp_path):
    """Also the model that they are inserted into."""
    whole = tiny.save_expanded(base, tmp_path / "expanded")
    more = ("--chat_template", "chatml", "--llama_pro_save", "blocks")
    write_random_run(one_rank, tmp_path / "run", args_for(whole, rows, "llama_pro", *more))
    assert saved_ids(tmp_path / "run") == official_ids()
    options = ["--model_name", whole, "--output_dir", tmp_path / "out"]
    insert = [*options, "--blocks", tmp_path / "run" / "new_blocks.safetensors"]
    assert block_expansion.main([*map(str, insert)]) == 0
    assert saved_ids(tmp_path / "out") == official_ids()


def test_a_tokenizer_beside_no_run_is_the_user_s(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())
    clear_output(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("options", "words"), [
    (["lora"], "this run does not train these: --train_embeddings true does"),
    (["lora", "--train_embeddings", "true"], "head; this run trains these"),
    (["full"], "head; this run trains these"),
])  # fmt: skip
def test_new_tokens_are_told_with_the_remedy(options, words, base, rows):
    argv = ["--model_name", base, "--dataset", rows, "--chat_template", "chatml", "--train_type", *options]
    told = "".join(make_job(SINGLE_RANK, argv).remarks)
    assert "new tokens <|im_start|>" in told and words in told


@pytest.mark.parametrize(("data", "template", "words"), [
    ("rows", "nowhere.jinja", "--chat_template nowhere.jinja: No such file or directory; expected chatml"),
    ("rows", "{{ messages }}{{ nothing.x }}", "line 1: 'nothing' is undefined"),
    ("alpaca_file", "chatml", "--chat_template: has no effect on rows of the format alpaca; --dataset_format"
     " chat renders such rows as conversations"),
    ({"question": "Hi", "answer": "Yo"}, "chatml", "of the format qa; --dataset_format chat renders such"),
    ({"text": "Hi"}, "chatml", "of the format completion; it renders conversations"),
])  # fmt: skip
def test_bad_input_writes_nothing(data, template, words, base, tmp_path, capsys, request):
    if isinstance(data, dict):
        dataset = tmp_path / "rows.jsonl"
        dataset.write_text(json.dumps(data) + "\n")
    else:
        dataset = request.getfixturevalue(data)
    out = tmp_path / "out"
    options = ["--model_name", base, "--dataset", dataset, "--output_dir", out, "--chat_template", template]
    assert train.main([*map(str, options), "--world_size", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1 and not out.exists()
