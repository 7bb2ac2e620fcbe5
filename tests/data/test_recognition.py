"""data/recognition.py: the format is that of all rows; where they differ, none is chosen for them."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.make_checkpoint import byte_tokenizer
from data.examples import read_examples
from data.formats import GUANACO_MARKERS
from data.reading import ReadingOptions, find_format
from data.recognition import list_candidates, recognise_format
from options.errors import UserError
from tests.helpers import chat_templates
from tests.helpers.data_files import to_jsonl, write_csv, write_file, write_parquet
from tests.helpers.small_tokenizers import chat_tokenizer

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
ALPACA = {"instruction": "Name a city.", "output": "Paris"}
QA = {"question": "2+2?", "answer": "4"}
DIALOGUE = {"text": "### Human: Hi### Assistant: Yo"}
PLAIN = {"text": "Once upon a time"}
TOKENIZER = chat_tokenizer(chat_templates.CHATML)


def read(path, dataset_format: str = "auto", **more):
    return read_examples(
        str(path), ReadingOptions(TOKENIZER, format=dataset_format, context_length=1000, **more)
    )


def recognise(rows, markers=GUANACO_MARKERS, has_template: bool = True) -> str:
    """Return the name of the format of rows, whose origins are their numbers."""
    origins = [str(i) for i, _ in enumerate(rows, 1)]
    return recognise_format(rows, origins, "here", markers, list_candidates(has_template))[0]


def learned(examples) -> list[str]:
    return [each.text[start:end] for each in examples.rendered for start, end in each.learned]


@pytest.mark.parametrize("row, name", [
    (ALPACA, "alpaca"),
    (ALPACA | {"input": "", "text": "### Assistant: both"}, "alpaca"),  # never alpaca_stanford
    (QA, "qa"),
    (QA | {"context": "C", "id": 1}, "qa"),
    (CHAT | {"prompt": "Hi"}, "chat"),
    (CHAT | ALPACA, "chat"),
    (DIALOGUE, "guanaco"),
    (PLAIN, "completion"),
    (ALPACA | {"output": ""}, "alpaca"),  # an empty answer, to be counted
    (ALPACA | {"output": "", "text": "Name a city.\nParis"}, "alpaca"),  # not the text of it
    (ALPACA | {"output": None}, "alpaca"),  # to be refused with its place
    ({"text": ""}, "completion"),
    ({"messages": []}, "chat"),
])  # fmt: skip
def test_rows_of_one_format(row, name):
    empty = dict.fromkeys(
        ("messages", "instruction", "input", "output", "question", "answer", "context", "text")
    )
    for rows in ([row], [row, row], [row, dict.fromkeys(row)], [empty | row, row], [{}, row]):
        assert recognise(rows) == name


def test_the_recipe_s_own_markers():
    rows = [{"text": "<human>: a<bot>: b"}]
    assert recognise(rows, ("<human>:", "<bot>:")) == "guanaco"
    assert recognise(rows) == "completion"


def test_unknown_columns_are_named():
    rows = [{"b": "x"}, {"a": "x", "\x1b[2J": "x"}]
    with pytest.raises(
        UserError, match=r"^here: columns '\\x1b\[2J', a, b fit no format .*alpaca: instruction, output"
    ):
        recognise(rows)


def test_rows_that_fit_no_format_get_a_remedy():
    error = r"columns ask fit no format .*; --columns, or a recipe's `columns`, says .*\(docs/data\.md\)$"
    with pytest.raises(UserError, match=error):
        recognise([{"ask": "x"}])


def test_the_columns_that_were_found_are_few_and_harmless(tmp_path):
    path = write_file(tmp_path / "a.jsonl", to_jsonl([{"\x1b[2J": 1} | {f"c{i:02}": i for i in range(99)}]))
    with pytest.raises(
        UserError,
        match=r"columns with content: '\\x1b\[2J', c00, .*, c18 and 80 more; --columns says which to ",
    ):
        read(path, "qa")


MIXED = {  # rows, what is told of them
    "chat and alpaca": ([CHAT, CHAT, ALPACA], "2 chat (first {}:1), 1 alpaca (first {}:3)"),
    "alpaca, then chat": ([ALPACA, CHAT], "1 alpaca (first {}:1), 1 chat (first {}:2)"),
    "alpaca and qa": ([QA, ALPACA, QA], "2 qa (first {}:1), 1 alpaca (first {}:2)"),
    "dialogues after a plain text": ([PLAIN, DIALOGUE, DIALOGUE],
        "1 completion (first {}:1), 2 guanaco (first {}:2)"),
    "a plain text among dialogues": ([DIALOGUE, PLAIN, DIALOGUE],
        "2 guanaco (first {}:1), 1 completion (first {}:2)"),
    "a question without its answer's marker": ([DIALOGUE, {"text": "### Human: Hi"}],
        "1 guanaco (first {}:1), 1 completion"),
    "late": ([ALPACA] * 3000 + [PLAIN], "3,000 alpaca (first {}:1), 1 completion (first {}:3001)"),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_rows_of_different_formats_are_refused(tmp_path, case):
    rows, told = MIXED[case]
    path = write_file(tmp_path / "a.jsonl", to_jsonl(rows))
    message = f"--dataset {path}: its rows are of different formats: {told.format(path, path)}"
    for reading in (read, lambda path: find_format(str(path), ReadingOptions(TOKENIZER))):
        with pytest.raises(UserError, match=f"^{re.escape(message)}.*--dataset_format"):
            reading(path)


@pytest.mark.parametrize("write, place", [(write_csv, ":3"), (write_parquet, " row 2")])
def test_a_table_in_which_each_row_fills_other_columns(tmp_path, write, place):
    """Each row has all columns, some without content: else answers to empty instructions would be learned."""
    nothing = "" if write is write_csv else None
    columns = dict.fromkeys((*ALPACA, *QA), nothing)
    path = write(tmp_path / f"a.{write.__name__[6:]}", [columns | ALPACA, columns | QA])
    with pytest.raises(
        UserError, match=re.escape(f"1 alpaca (first {path}") + f".*1 qa .first {path}{place}"
    ):
        read(path)


def test_null_messages_in_some_rows(tmp_path):
    rows = [CHAT | dict.fromkeys(ALPACA), {"messages": None} | ALPACA]
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(UserError, match=r"1 chat .*1 alpaca"):
        read(path)
    rows[1] |= dict.fromkeys(ALPACA)
    with pytest.raises(UserError, match=r"a\.parquet row 2: column messages is missing or empty$"):
        read(write_parquet(tmp_path / "a.parquet", rows))


def test_optional_columns_may_be_missing_in_some_rows(tmp_path):
    rows = [ALPACA | {"input": "in France"}, ALPACA, ALPACA | {"input": None}]
    for order in (rows, rows[::-1]):
        examples = read(write_file(tmp_path / "a.jsonl", to_jsonl(order)))
        assert examples.format == "alpaca" and learned(examples) == ["Paris"] * 3
        assert sorted("in France" in each.text for each in examples.rendered) == [False, False, True]


def test_what_is_asked_for_by_name_is_done(tmp_path):
    """And rows of which nothing is learned are counted in a line."""
    path = write_file(tmp_path / "a.jsonl", to_jsonl([DIALOGUE, PLAIN, DIALOGUE, PLAIN]))
    guanaco = read(path, "guanaco")
    assert learned(guanaco) == [" Yo", " Yo"]
    assert guanaco.remarks == (
        "data: 2 of 4 rows have no marker '### Assistant:'; nothing of them is learned",
    )
    whole = read(path, "completion")
    assert learned(whole) == [DIALOGUE["text"], PLAIN["text"]] * 2 and whole.remarks == ()
    recipe = write_file(tmp_path / "mine.toml", 'source = "a.jsonl"\nformat = "guanaco"\n')
    assert learned(read(recipe)) == [" Yo", " Yo"] and read(recipe).remarks == guanaco.remarks


SOLAR = "### User:\nWhat?\n\n### Assistant:\nYo\n\n### User:\nAnd?\n\n### Assistant:\nYo"


@pytest.mark.parametrize(
    "text", [SOLAR, SOLAR.replace("User", "Instruction"), "### Input: a ### Assistant: b"]
)
@pytest.mark.parametrize("name", ["auto", "guanaco"])
def test_dialogues_with_other_headers_are_refused(name, text, tmp_path):
    """Their questions would be learned as answers. A recipe names the markers."""
    header = text[: text.index(":") + 1]
    path = write_file(tmp_path / "a.jsonl", to_jsonl([{"text": text}]))
    words = rf"a\.jsonl:1: has '{header}' where the format has '### Human:'; .* markers = \['{header}'"
    with pytest.raises(UserError, match=words):
        read(path, name)
    recipe = f'source = "a.jsonl"\nformat = "guanaco"\nmarkers = ["{header}", "### Assistant:"]\n'
    spans = learned(read(write_file(tmp_path / "mine.toml", recipe)))
    assert all("?" not in span and "a" not in span for span in spans) and spans


def test_headers_within_answers_are_told(tmp_path):
    rows = [{"text": "### Human: a### Assistant: b\n### System: c"}, {"text": "### Human: a### Assistant: b"}]
    examples = read(write_file(tmp_path / "a.jsonl", to_jsonl(rows)))
    assert learned(examples) == [" b\n### System: c", " b"]
    assert examples.remarks == (
        "data: rows whose answers hold headers, which are learned as text of the answer: ### System: (1)",
    )


PREFERRED = {  # rows, the format of the run: the one they are read in
    "the run's": ([QA | ALPACA] * 2, "qa", "qa"),
    "the run's, by name": ([ALPACA] * 2, "alpaca_stanford", "alpaca_stanford"),
    "their own": ([ALPACA] * 2, "qa", "alpaca"),
    "of a run of plain texts": ([DIALOGUE] * 2, "completion", "completion"),
    "the first fits the run's": ([ALPACA, QA], "alpaca", None),
    "the last does": ([ALPACA, QA], "qa", None),
    "some dialogues": ([DIALOGUE, PLAIN], "guanaco", None),
}  # fmt: skip


@pytest.mark.parametrize("case", PREFERRED)
def test_rows_beside_the_data(tmp_path, case):
    """The run's format goes first where all rows fit it."""
    rows, preferred, expected = PREFERRED[case]
    path = write_file(tmp_path / "a.jsonl", to_jsonl(rows))
    if expected:
        assert read(path, preferred=preferred).format == expected
    else:
        with pytest.raises(UserError, match="its rows are of different formats"):
            read(path, preferred=preferred)
    recipe = write_file(tmp_path / "mine.toml", 'source = "a.jsonl"\nformat = "guanaco"\n')
    if "text" in rows[0]:  # a recipe has decided
        assert read(recipe, preferred="guanaco").format == read(recipe, preferred="qa").format == "guanaco"


UNREAD = {  # name of the format, rows, the columns that are not read
    "some rows": ("auto", [ALPACA, ALPACA | {"id": 1}, ALPACA | {"source": "s", "id": 2}], "id, source"),
    "the optional one is": ("auto", [ALPACA | {"input": "x"}], ""),
    "nothing in it": ("auto", [ALPACA | {"id": None}], ""),
    "by another format": ("qa", [QA | ALPACA], "instruction, output"),
    "chat": ("auto", [CHAT | {"prompt": "Hi"}], "prompt"),
    "odd names": ("auto", [QA | {"a\nb": 1, "\x1b[2J": 3}], r"'a\nb', '\x1b[2J'"),
    "pandas' index": ("auto", [QA | {"": 2}], "a column without a name"),
    "many": ("auto", [QA | {f"c{i}": i for i in range(30)}],
        ", ".join(f"c{i}" for i in range(20)) + " and 10 more"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_columns_that_are_not_read_are_told(tmp_path, case):
    name, rows, told = UNREAD[case]
    expected = (f"data: columns that are not read: {told}",) if told else ()
    assert read(write_file(tmp_path / "a.jsonl", to_jsonl(rows)), name).remarks == expected


def test_columns_that_a_recipe_names_are_read(tmp_path):
    write_file(tmp_path / "a.jsonl", json.dumps({"ask": "Q", "reply": "A", "id": 1}) + "\n")
    recipe = write_file(tmp_path / "mine.toml", (
        'source = "a.jsonl"\ncolumns = { question = "ask", answer = "reply" }\n'
    ))  # fmt: skip
    assert read(recipe).remarks == ("data: columns that are not read: id",)
    assert (
        read_examples("dummy", ReadingOptions(byte_tokenizer(), samples=3, context_length=10)).remarks == ()
    )
    assert read_examples("toy", ReadingOptions(byte_tokenizer(), samples=3, context_length=10)).remarks == ()
