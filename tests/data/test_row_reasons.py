"""Rows that are dropped or cut are counted by reason, with the numbers of the first ones."""

from __future__ import annotations

import pickle
from pathlib import Path

import train
from benchmarks.make_checkpoint import byte_tokenizer
from data.formats import QA
from data.reading import ReadingOptions
from data.row_reasons import (
    CUT_ANSWER,
    CUT_REST,
    FIRST_TOKEN,
    LONG_PROMPT,
    NO_ANSWER,
    ReasonCounter,
    RowReason,
)
from data.tokenizing import tokenize_dataset
from tests.helpers.data_files import to_jsonl, write_file

# With byte tokens and BOS, the prompt of "?" takes 1 + len(QA) - len("{question}") + 1 tokens.
PROMPT_TOKENS = 1 + len(QA.format(question="?"))
ROWS = (
    [("?", "yes")] * 2  # 1, 2: kept whole
    + [("?", ""), ("?", " \n")]  # 3, 4: nothing to learn
    + [("?" * 12, "yes"), ("?" * 11, "yes")]  # 5, 6: the prompt leaves no room, and just none
    + [("?" * 10, "yes")]  # 7: room for one token
    + [("?", "<s>")] * 3  # 8 to 10: nothing but BOS
    + [("?", "x" * 30)]  # 11: cut
)
CONTEXT = PROMPT_TOKENS + 10


def write_rows(folder: Path, rows: list[tuple[str, str]]) -> str:
    """Write questions and answers into a file; return its path."""
    texts = [{"question": question, "answer": answer} for question, answer in rows]
    return str(write_file(folder / "rows.jsonl", to_jsonl(texts)))


def test_rows_of_a_file(tmp_path):
    """Each reason is checked by hand: the answers need len + 1 tokens after the prompt's."""
    made = tokenize_dataset(
        write_rows(tmp_path, ROWS), ReadingOptions(byte_tokenizer(), context_length=CONTEXT)
    )
    assert made.row_numbers.tolist() == [1, 2, 7, 11]
    assert made.drop_reasons == (
        RowReason(NO_ANSWER, 5, (3, 4, 8)),
        RowReason(LONG_PROMPT, 2, (5, 6)),
    )
    assert made.cut_reasons == (RowReason(CUT_ANSWER, 2, (7, 11)),)
    assert (made.dropped, made.cut) == (7, 2)
    assert made.describe_reasons() == [
        "5 rows dropped: no answer has any text to learn (rows 3, 4, 8, ...)",
        "2 rows dropped: the prompt fills --context_length (rows 5, 6)",
        "2 rows cut: the end of an answer is beyond --context_length (rows 7, 11)",
    ]
    assert pickle.loads(pickle.dumps(made)).drop_reasons == made.drop_reasons  # as ranks get them


def test_what_is_cut_may_not_be_learned(tmp_path):
    """A question after the last answer; and a text of which nothing but its first token would be left."""
    dialogue = {"text": "### Human: a### Assistant: b### Human: " + "c" * 50}
    file = write_file(tmp_path / "a.jsonl", to_jsonl([dialogue, {"text": "### Human: a"}]))
    made = tokenize_dataset(str(file), ReadingOptions(byte_tokenizer(), format="guanaco", context_length=40))
    assert made.cut_reasons == (RowReason(CUT_REST, 1, (1,)),)
    assert made.drop_reasons == (RowReason(NO_ANSWER, 1, (2,)),)


def test_many_rows_take_three_numbers():
    counter = ReasonCounter()
    for number in range(1, 1001):
        counter.add(FIRST_TOKEN, number)
    (reason,) = counter.reasons()
    assert reason == RowReason(FIRST_TOKEN, 1000, (1, 2, 3))
    assert reason.describe("dropped").startswith("1,000 rows dropped: ")
    assert reason.describe("dropped").endswith(" (rows 1, 2, 3, ...)")


def test_a_run_says_why_at_its_start(checkpoints, tmp_path, capfd):
    """The lines are about the training rows and about the evaluation set."""
    file = write_rows(tmp_path, ROWS)
    argv = ["--model_name", str(checkpoints()), "--dataset", file, "--context_length", str(CONTEXT)]
    argv += ["--eval_dataset", file, "--output_dir", str(tmp_path / "out")]
    assert train.main([*argv, "--show_rows", "1"]) == 0
    printed = capfd.readouterr().out.splitlines()
    reasons = [line for line in printed if " rows dropped: " in line or " rows cut: " in line]
    assert reasons == [
        f"{kind}: {line}"
        for kind in ("data", "evaluation")
        for line in (
            "5 rows dropped: no answer has any text to learn (rows 3, 4, 8, ...)",
            "2 rows dropped: the prompt fills --context_length (rows 5, 6)",
            "2 rows cut: the end of an answer is beyond --context_length (rows 7, 11)",
        )
    ]
    assert not (tmp_path / "out").exists()
