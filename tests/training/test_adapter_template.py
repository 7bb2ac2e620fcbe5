"""--adapter and conversations: the template, the tokens and the empty thoughts that it was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import train
from benchmarks.make_checkpoint import byte_tokenizer
from files.names import ADAPTER_CONFIG
from options.errors import UserError
from options.train import parse
from tests.helpers import tiny
from tests.helpers.adapters import args_for, save_peft_adapter
from tests.helpers.chat_templates import PLAIN_CHATML
from tests.helpers.finished_runs import write_random_run

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
OTHER = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base with a template of its own and room for tokens."""
    folder = tiny.save_checkpoint("llama", tmp_path_factory.mktemp("base") / "base")
    (folder / "chat_template.jinja").write_text(OTHER)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n")
    return path


@pytest.fixture
def check(base, rows, tmp_path):
    """check(adapter, option=value ...) -> the job of a run that continues the adapter."""

    def check(adapter, **options):
        good = {"model_name": base, "dataset": rows, "train_type": "qlora", "adapter": adapter}
        given = good | {"output_dir": tmp_path / "out", "world_size": 1} | options
        return train.check_run(parse([f"--{name}={value}" for name, value in given.items()])[0])

    return check


def chatml_tokenizer(*tokens: str):
    """The base's tokenizer as transformers makes it with ChatML, and with tokens in this order."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = PLAIN_CHATML
    return tokenizer


@pytest.fixture
def saved(base, tmp_path):
    """saved(tokenizer) -> PEFT's adapter with the tokenizer's files beside it, as TRL saves them."""

    def save(tokenizer) -> Path:
        folder = save_peft_adapter(base, tmp_path / "adapter")
        tokenizer.save_pretrained(folder)
        return folder

    return save


def told(job) -> str:
    return "\n".join(job.remarks)


def test_a_run_is_continued_with_its_template(base, rows, one_rank, check, tmp_path):
    """Without the option; given, another one is used, and a line says so."""
    run = tmp_path / "run"
    write_random_run(one_rank, run, args_for(base, rows, "qlora", "--chat_template", "chatml"))
    template = (run / "chat_template.jinja").read_text()
    expected = AutoTokenizer.from_pretrained(run).apply_chat_template(TURNS)["input_ids"]
    job = check(run)
    assert job.rows.tokens.tolist() == expected and job.config.chat_template == template
    assert f"--adapter {run}: its chat template is used" in told(job)
    assert job.adapter_files["chat_template.jinja"] == template, "the result has it, too"
    same = check(run, chat_template="chatml")
    assert same.rows.tokens.tolist() == expected and "--chat_template" not in told(same)
    (tmp_path / "other.jinja").write_text(OTHER)
    other = check(run, chat_template=tmp_path / "other.jinja")
    assert other.rows.tokens.tolist() != expected and other.config.chat_template == OTHER
    assert "--chat_template: another template than the adapter was trained with (that beside it)" in told(
        other
    )
    questions = tiny.write_questions(tmp_path / "questions.jsonl", even=True)
    assert check(run, dataset=questions).config.chat_template == template, "kept with the adapter"


def test_a_run_on_the_bases_own_template(base, rows, one_rank, check, tmp_path):
    write_random_run(one_rank, tmp_path / "run", args_for(base, rows, "qlora"))
    job = check(tmp_path / "run")
    assert job.config.chat_template is None and "its chat template" not in told(job)
    other = check(tmp_path / "run", chat_template="chatml")
    assert "another template than the adapter was trained with (the base's)" in told(other)


@pytest.mark.parametrize("trained", ["prompt", "learn"])
def test_empty_thoughts_are_learned_as_before(trained, base, rows, one_rank, check, tmp_path):
    """The template `qwen` writes an empty thought before an answer without one."""
    run, options = tmp_path / "run", ("--chat_template", "qwen", "--empty_thinking", trained)
    write_random_run(one_rank, run, args_for(base, rows, "qlora", *options))
    job = check(run, dataset=rows)
    assert job.config.empty_thinking == trained and f"--empty_thinking {trained}, which is used" in told(job)
    learned = AutoTokenizer.from_pretrained(run).decode(job.rows.tokens[job.rows.learned])
    assert ("<think>" in learned) == (trained == "learn")
    given = {"prompt": "learn", "learn": "prompt"}[trained]
    other = check(run, dataset=rows, empty_thinking=given)
    assert other.config.empty_thinking == given
    assert f"--empty_thinking {given}: the adapter was trained with {trained}" in told(other)


def test_the_tokenizer_beside_pefts_adapter(check, saved):
    """Its template and the tokens of its markers; other tokens of it are told."""
    tokenizer = chatml_tokenizer("<|im_start|>", "<|im_end|>", "<|pad|>")
    job = check(saved(tokenizer))
    assert job.rows.tokens.tolist() == tokenizer.apply_chat_template(TURNS)["input_ids"]
    assert job.config.chat_template == PLAIN_CHATML
    pad = tokenizer.convert_tokens_to_ids("<|pad|>")
    assert (
        f"its tokenizer has <|pad|> ({pad}), which" in told(job)
        and "im_start" not in told(job).partition("its tokenizer has")[2].partition("\n")[0]
    )


def test_the_template_alone_beside_pefts_adapter(base, check, tmp_path):
    """As a file, or in tokenizer_config.json as older versions of transformers write it."""
    folder = save_peft_adapter(base, tmp_path / "adapter")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": PLAIN_CHATML}))
    assert check(folder).config.chat_template == PLAIN_CHATML
    (folder / "chat_template.jinja").write_text(OTHER)
    assert check(folder).config.chat_template is None, "the base's own"
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match=rf"--adapter {folder}: its chat template: does not render|line 1"):
        check(folder)


def test_tokens_with_other_ids_are_refused(check, saved):
    """The adapter learned <|im_end|> under the id that the run would give to <|im_start|>."""
    folder = saved(chatml_tokenizer("<|im_end|>", "<|im_start|>"))
    with pytest.raises(
        UserError, match=r"its chat template writes <\|im_end\|> \(.*does not encode so; name"
    ):
        check(folder)
    assert (folder / ADAPTER_CONFIG).is_file()
