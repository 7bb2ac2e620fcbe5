"""data/examples.py: rows of a dataset, read and rendered, by several processes if there are many."""

from __future__ import annotations

import json
import os
import signal

import pytest

from benchmarks.make_checkpoint import byte_tokenizer
from data import examples
from data.reading import ReadingOptions
from data.tokenizing import tokenize_dataset
from options.errors import UserError
from tests.helpers import chat_templates
from tests.helpers.small_tokenizers import BYTES


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


CHAT_HALF = [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "Yo"}]


@pytest.mark.parametrize(
    "row, column", [({"text": "half a smile: \ud83d"}, "text"), ({"messages": CHAT_HALF}, "messages")]
)
def test_a_row_with_half_a_character_is_named_with_its_column(row, column, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_templates.QWEN3
    fine = json.loads(json.dumps(row).replace("\\ud83d", "x"))
    file = write(tmp_path / "a.jsonl", [fine, row])
    error = rf"a\.jsonl:2: column {column} holds half a character \(a surrogate\), '\\ud83d'$"
    with pytest.raises(UserError, match=error):
        tokenize_dataset(file, ReadingOptions(tokenizer, context_length=1000))


def test_the_user_can_name_the_format(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "### Human: a### Assistant: b"}])
    for name, learned in (("auto", " b</s>"), ("completion", "### Human: a### Assistant: b</s>")):
        rows = tokenize_dataset(file, ReadingOptions(BYTES, format=name, context_length=100))
        assert BYTES.decode(rows.tokens[rows.learned]) == learned
    with pytest.raises(UserError, match=r"a\.jsonl:1: columns instruction, output are missing or empty"):
        tokenize_dataset(file, ReadingOptions(BYTES, format="alpaca", context_length=100))


def test_row_numbers_are_the_datasets_own(tmp_path):
    """Rows that are dropped are counted."""
    rows = [{"question": "a", "answer": text} for text in ("b", "", "c", " ", "d")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared = tokenize_dataset(
        str(tmp_path / "rows.jsonl"), ReadingOptions(byte_tokenizer(), context_length=100)
    )
    assert prepared.dropped == 2 and prepared.row_numbers.tolist() == [1, 3, 5]


def test_dummy_fills_the_context_to_the_last_token():
    rows = tokenize_dataset("dummy", ReadingOptions(BYTES, samples=3, context_length=333))
    assert rows.lengths().tolist() == [333] * 3
    assert rows.cut == 3


def test_a_large_chat_file_is_rendered_by_several_processes(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_templates.QWEN3
    turns = [("user", "Hi"), ("assistant", "Yo"), ("user", "Bye"), ("assistant", "Ciao")]
    rows = [{"messages": [{"role": r, "content": f"{t} {i}"} for r, t in turns]} for i in range(2001)]
    file = write(tmp_path / "a.jsonl", rows)
    results = set()
    renderer = examples._RowRenderer
    monkeypatch.setattr(renderer, "__call__", count_workers(renderer.__call__, tmp_path))
    for cores in (3, 1):
        monkeypatch.setattr(examples, "count_cpus", lambda cores=cores: cores)
        results.add(tokenize_dataset(file, ReadingOptions(tokenizer)).tokens.numpy().tobytes())
    assert len(results) == 1  # the same rows in the same order
    assert len(list(tmp_path.glob("worker-*"))) > 2  # several, and this process with one core

    rows[1500]["messages"][0] = {"role": "user", "content": None}
    monkeypatch.setattr(examples, "count_cpus", lambda: 3)
    with pytest.raises(
        UserError, match=r"a\.jsonl:1501: message 1 has no content, only role; messages must be"
    ):
        tokenize_dataset(write(tmp_path / "a.jsonl", rows), ReadingOptions(tokenizer))


def count_workers(render, folder):
    """Return `render`, which also leaves a file named by its process."""

    def render_and_count(self, indices):
        (folder / f"worker-{os.getpid()}").touch()
        return render(self, indices)

    return render_and_count


def kill_a_worker(indices: range):
    if 400 in indices:
        os.kill(os.getpid(), signal.SIGKILL)
    return examples._worker_renderer(indices)


def test_a_data_worker_that_is_killed(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 2000)
    monkeypatch.setattr(examples, "_render_in_worker", kill_a_worker)
    monkeypatch.setattr(examples, "count_cpus", lambda: 2)
    with pytest.raises(
        UserError, match="one of 2 processes that render its rows was killed; out of host memory"
    ):
        tokenize_dataset(str(tmp_path / "rows.jsonl"), ReadingOptions(tokenizer, context_length=100))
