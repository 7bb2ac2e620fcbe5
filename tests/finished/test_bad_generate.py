"""Errors on generate.py's command line: exit status 2 and one line, before weights are loaded."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys

import pytest

import generate
from data.formats import RenderContext
from files.names import ADAPTER
from finished import generation
from finished.finished_run import open_run
from finished.generation import make_template
from options.errors import UserError
from options.generate import Prompt, Sampling, parse, read_prompts
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import write_random_run


@pytest.fixture
def refused(capsys, monkeypatch):
    """refused(*argv) -> the error line of a command that must not load weights."""
    monkeypatch.setattr(generation, "load_model", None)

    def refused(*argv) -> str:
        status, shown = generate.main(list(map(str, argv))), capsys.readouterr()
        assert status == 2 and not shown.out, shown
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
        return shown.err

    return refused


@pytest.mark.parametrize(("options", "words"), [
    ("--temperature -1", "--temperature -1: must be 0 or more"),
    ("--temperature nan", "--temperature: 'nan' is not a number"),
    ("--temperature 1 --top_p 0", "--top_p 0: must be above 0"),
    ("--temperature 1 --top_p 1.5", "--top_p 1.5: must be"),
    ("--temperature 1 --top_k -3", "--top_k -3: must be"),
    ("--temperature 1 --seed -1", "--seed -1: must be"),
    ("--top_p 0.9", "no effect with --temperature 0"),
    ("--max_new_tokens 0", "--max_new_tokens 0: must be positive"),
    ("--max-new-tokens many", "'many' is not a whole number"),
    ("--repetition_penalty 0", "--repetition_penalty 0: must be above 0"),
    ("--precision int8", "'int8': must be one of auto, fp32, bf16, fp16"),
    ("--device tpu", "is not one of cpu, cuda"),
    ("--device cuda:99", "--device cuda:99: this machine has"),
    ("--dataset_format xml", "'xml': must be one of auto, alpaca"),
    ("--tempreature 1", "did you mean --temperature?"),
    ("--json maybe", "is not true or false"),
    ("--out table.xlsx", "--out table.xlsx: must end with one of .md, .html, .csv, .jsonl"),
    ("--out /dev/null/table.md", "--out /dev/null: cannot be written"),
])  # fmt: skip
def test_wrong_options(options, words, runs, refused):
    assert words in refused(runs[0], "--prompt", "Hi", *options.split())


def test_options_are_read_before_torch():
    """The modules that check options import neither torch nor transformers."""
    modules = "sys, options.generate, options.evaluate, options.export, options.block_expansion"
    code = f"import {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as e:
        parse(["--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in vars(Sampling()))


def test_prompts_that_are_none(runs, chat_run, refused, tmp_path):
    file = tmp_path / "rows.jsonl"
    assert "--prompt 2: is empty" in refused(runs[0], "--prompt", "Hi", "--prompt", " ")
    assert "takes 7" in refused(runs[0], "--prompt", "x" * 600) and "512 positions" in refused(
        runs[0], "--prompt", "x" * 600
    )
    assert "No such file" in refused(runs[0], "--prompts", file)
    for text, words in (
        ("", "holds no prompt"),
        ("{", "rows.jsonl:1: not JSON"),
        ("\n[1]", "rows.jsonl:2: neither a JSON object nor a text"),
        ('{"output": "x"}', "rows.jsonl:1: column instruction is missing or empty"),
        ('{"instruction": ""}', "rows.jsonl:1: instruction is empty"),
        ('{"instruction": ["x"]}', "rows.jsonl:1: column instruction holds a list"),
    ):
        file.write_text(text)
        assert words in refused(runs[0], "--prompts", file)
    file.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused(runs[0], "--prompts", file)
    file.write_text('{"messages": [{"role": "assistant", "content": "Yo"}]}')
    assert "no message to be answered" in refused(chat_run, "--prompts", file)
    assert "no chat template" in refused(runs[0], "--prompt", "Hi", "--dataset_format", "chat")
    assert "--json: needs" in refused(runs[0], "--json")


def test_tables_that_cannot_be_made(runs, chat_run, refused, tmp_path):
    """Before weights are loaded, so that no answer is lost."""
    file, table = tmp_path / "ask.jsonl", tmp_path / "table.md"
    file.write_text('{"instruction": "Hi"}\n')
    assert "--out: needs --prompt or --prompts" in refused(runs[0], "--out", table)
    assert "is the file of --prompts" in refused(runs[0], "--prompts", file, "--out", file)
    assert "must have one base" in refused(runs[0], chat_run, "--prompts", file, "--out", table)
    assert "is given twice" in refused(runs[0], runs[1], runs[0], "--prompts", file, "--out", table)
    table.mkdir()
    assert f"--out {table}: is a folder" in refused(runs[0], "--prompts", file, "--out", table)
    file.write_text("\n")
    assert f"--prompts {file}: holds no prompt" in refused(runs[0], "--prompts", file, "--out", "t.md")


def test_blank_lines_are_no_prompts(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n\n two\n".encode())
    assert [(p.origin.rpartition(":")[2], p.content) for p in read_prompts(tmp_path / "p.txt")] == [
        ("1", "one"),
        ("3", " two"),
    ]


def test_runs_that_are_none(runs, chat_run, checkpoints, alpaca_file, one_rank, refused, tmp_path):
    asked = ["--prompt", "Hi"]
    assert "give a RUN" in refused(*asked)
    assert "no such folder" in refused(tmp_path / "none", *asked)
    assert "is no run of train.py" in refused(tmp_path, *asked)
    assert "is given twice" in refused(runs[0], runs[0], *asked)
    assert "must have one base" in refused(runs[0], chat_run, *asked)
    write_random_run(one_rank, tmp_path / "dense", args_for(checkpoints("llama_bias"), alpaca_file, "lora"))
    line = refused(runs[0], tmp_path / "dense", *asked)
    assert "its base is not packed" in line and "packed by bnb" in line
    assert "trained on another model" in refused(runs[0], *asked, "--base_model", checkpoints("mistral"))
    half = shutil.copytree(runs[0], tmp_path / "half")
    config = (half / "config.yaml").read_text()
    (half / "config.yaml").write_text(config.replace("lora_rank: 8", "lora_rank: 16"))
    assert "lora_A.weight has shape [8, " in refused(half, *asked)
    gone = config.replace(str(alpaca_file), str(tmp_path / "gone.jsonl"))
    (half / "config.yaml").write_text(gone.replace("dataset_format: alpaca", "dataset_format: auto"))
    line = refused(half, *asked)
    assert "gone.jsonl: no such file" in line and "--dataset_format" in line
    (half / ADAPTER).unlink()
    assert "half written" in refused(half, *asked)


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No\nsystem') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize("template, reason", [
    (NO_SYSTEM, "the chat template takes no system prompt (No system)"),
    ("{{ messages[-1].content }}", "the chat template does not show a system prompt"),
])  # fmt: skip
def test_a_template_without_a_system_prompt(template, reason, chat_run, refused, monkeypatch):
    load = generation.load_tokenizer

    def load_other(run):
        tokenizer = load(run)
        tokenizer.chat_template = template
        return tokenizer

    monkeypatch.setattr(generation, "load_tokenizer", load_other)
    line = refused(chat_run, "--prompt", "Hi", "--system", "Be brief.")
    assert line == f"error: --system: has no effect on {chat_run}: {reason}\n"


def test_options_without_effect_on_a_format(runs, chat_run, refused):
    line = refused(runs[0], "--prompt", "Hi", "--system", "Be brief.")
    assert f"--system: has no effect on {runs[0]}: only conversations have a system prompt" in line
    for run in (runs[0], chat_run):
        line = refused(run, "--prompt", "Hi", "--thinking", "false")
        assert "--thinking false: has no effect" in line and "no empty thinking block" in line


@pytest.mark.parametrize("template, reason", [
    ("{{ 1 // 0 }}", "integer division or modulo by zero"),
    ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
    ("{{ messages[7].content + 'a' }}", "list object has no element 7"),
])  # fmt: skip
def test_what_a_chat_template_raises_is_one_line(template, reason, chat_run, monkeypatch):
    """The error is the same as at the start of training."""
    run_template = make_template(open_run(chat_run), "auto")
    monkeypatch.setattr(run_template.tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=f"^--prompt 1: {reason}$"):
        context = RenderContext(run_template.tokenizer)
        dataclasses.replace(run_template, context=context).render(Prompt("--prompt 1", "Hi"))
