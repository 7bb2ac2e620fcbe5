"""Empty thinking blocks: a run records whether its questions ended with one, and is asked in the same way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import generate
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import write_random_run
from tests.helpers.runs import make_job

ASKED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
QUESTION = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yo"}


def write_rows(path: Path, *answers: dict) -> Path:
    path.write_text("".join(json.dumps({"messages": [QUESTION, answer]}) + "\n" for answer in answers))
    return path


@pytest.fixture(scope="module")
def run(checkpoints, one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("thinking")
    rows = write_rows(folder / "rows.jsonl", ANSWER)
    write_random_run(
        one_rank, folder / "run", args_for(checkpoints(), rows, "qlora", "--chat_template", "qwen")
    )
    return folder / "run"


def change_option(run: Path, **changed: str | None) -> None:
    """Change options in config.yaml; None removes one."""
    path = run / "config.yaml"
    options = yaml.safe_load(path.read_text()) | changed
    path.write_text(
        yaml.safe_dump({name: v for name, v in options.items() if v is not None or name not in changed})
    )


def test_a_run_is_asked_as_it_learned(run, capsys):
    """A RUN of an earlier version learned the empty block."""

    def rendered(*more: str) -> str:
        asked = ["--prompt", "Hi", "--max_new_tokens", "1", "--compare", "false", "--json"]
        assert generate.main([str(run), *asked, *more]) == 0
        return json.loads(capsys.readouterr().out)["rendered"]

    assert yaml.safe_load((run / "config.yaml").read_text())["empty_thinking"] == "prompt"
    assert rendered() == rendered("--thinking", "false") == ASKED + EMPTY
    assert rendered("--thinking", "true") == ASKED
    change_option(run, empty_thinking=None)
    assert rendered() == ASKED and rendered("--thinking", "false") == ASKED + EMPTY
    change_option(run, empty_thinking="prompt")


@pytest.mark.parametrize(("given", "thoughts", "recorded", "learned", "prompt"), [
    ("auto", [None], "prompt", ["Yo<|im_end|>"], ASKED + EMPTY),
    ("learn", [None], "learn", [EMPTY + "Yo<|im_end|>"], ASKED),
    ("auto", ["Hm."], "auto", ["<think>\nHm.\n</think>\n\nYo<|im_end|>"], ASKED),
    ("auto", ["Hm.", None], "prompt", ["<think>\nHm.\n</think>\n\nYo<|im_end|>", "Yo<|im_end|>"],
        ASKED + EMPTY),
])  # fmt: skip
def test_what_is_recorded(given, thoughts, recorded, learned, prompt, checkpoints, tmp_path):
    """Samples of questions in a text file are asked in the same way."""
    answers = [ANSWER | ({"reasoning_content": thought} if thought else {}) for thought in thoughts]
    rows, questions = write_rows(tmp_path / "rows.jsonl", *answers), tmp_path / "questions.txt"
    questions.write_text("Hi")
    more = ["--empty_thinking", given, "--sample_every", "1", "--sample_prompts", str(questions)]
    args = args_for(checkpoints(), rows, "qlora", "--chat_template", "qwen", *more)
    job = make_job(type("Ranks", (), {"world": 1}), args)
    tokenizer, data = job.read_tokenizer(), job.rows
    ranges = zip(data.starts[:-1].tolist(), data.starts[1:].tolist(), strict=True)
    texts = [tokenizer.decode(data.tokens[a:b][data.learned[a:b]]) for a, b in ranges]
    assert job.config.empty_thinking == recorded and texts == learned
    assert [sample.text for sample in job.evaluation.prompts] == [prompt]
    told = [remark for remark in job.remarks if "empty thinking block" in remark]
    assert len(told) == (recorded == "prompt")
    assert not told or told[0].startswith(f"data: 1 of {len(answers)} rows have an empty thinking block")
