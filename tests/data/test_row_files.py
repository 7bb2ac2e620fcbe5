"""data/row_files.py: numbers keep what the file says, and what no number means is never learned."""

from __future__ import annotations

import json

import numpy
import pyarrow
import pytest

from data.examples import read_examples
from options.errors import UserError
from options.exact_json import ExactFloat, parse_json, text_of
from options.generate import read_prompts
from options.limits import CONFIG_FILE, read_json
from tests.helpers.data_files import jsonl, put, read, write_parquet
from tests.helpers.small_tokenizers import BYTES, chat_tokenizer

NO_JSON = ["NaN", "Infinity", "-Infinity", "1e400", "-1e999", "1" + "0" * 400 + ".5"]
PLACES = ['{{"question": "Q", "answer": {}}}', '{{"question": "Q", "answer": "A", "score": {}}}',
          '{{"question": "Q", "answer": "A", "more": [{{"a": [1, {}]}}]}}']  # fmt: skip
GOOD = '{"question": "Is it NaN?", "answer": "Infinity"}'


def learned(dataset) -> list[str]:
    rendered = read_examples(str(dataset), "auto", -1, 1000, BYTES).rendered
    return [each.text[start:end] for each in rendered for start, end in each.learned]


@pytest.mark.parametrize("number", NO_JSON)
@pytest.mark.parametrize("place", PLACES, ids=["read", "not read", "nested"])
def test_what_json_cannot_mean_is_refused_with_its_line(tmp_path, place, number):
    bad = place.format(number)
    files = {
        "a.jsonl": f"{GOOD}\n\n{bad}\n",
        "a.json": f"[{GOOD},\n\n  {bad}, {GOOD}]",
        "lines.json": f"{GOOD}\n\n{bad}",
    }
    for name, text in files.items():
        with pytest.raises(UserError, match=rf"^--dataset .*{name}:3: not usable JSON \({number[:9]}"):
            read(put(tmp_path / name, text))


@pytest.mark.parametrize("number", NO_JSON)
def test_nor_is_it_read_from_other_files(tmp_path, number):
    path = put(tmp_path / "config.json", f'{{"rope_theta": {number}}}')
    with pytest.raises(UserError, match=rf"config\.json: not a valid JSON file \({number[:9]}"):
        read_json(path, CONFIG_FILE)
    path = put(tmp_path / "ask.jsonl", f'{GOOD}\n{{"question": {number}}}\n')
    with pytest.raises(UserError, match=rf"^--prompts .*ask\.jsonl:2: not JSON \({number[:9]}"):
        read_prompts(path)


def test_a_key_twice_has_no_value(tmp_path):
    path = put(tmp_path / "a.jsonl", f'{GOOD}\n{{"question": "Q", "answer": "A", "answer": "B"}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not usable JSON \('answer' stands twice"):
        read(path)


NUMBERS = ["1.10", "4.0", "4", "1e5", "1E-7", "0.1", "-0.0", "0.30000000000000004", "3.141592653589793238462643",
           "12345678901234567890123", "100000000000000000000000.0"]  # fmt: skip


def test_a_number_is_learned_as_it_is_written(tmp_path):
    lines = [f'{{"question": "Q", "answer": {number}}}' for number in NUMBERS]
    for path in (
        put(tmp_path / "a.jsonl", "\n".join(lines)),
        put(tmp_path / "a.json", f"[{','.join(lines)}]"),
    ):
        assert learned(path) == NUMBERS
    folder = put(tmp_path / "folder" / "a.jsonl", "\n".join(lines)).parent
    assert learned(folder) == NUMBERS
    assert (
        learned(put(tmp_path / "a.csv", "question,answer\n" + "".join(f"Q,{n}\n" for n in NUMBERS)))
        == NUMBERS
    )


@pytest.mark.parametrize("kind, value, text", [
    (pyarrow.float32(), 0.1, "0.1"), (pyarrow.float32(), 1e10, "1e+10"), (pyarrow.float16(), 0.1, "0.1"),
    (pyarrow.float64(), 0.1, "0.1"), (pyarrow.int64(), 2**63 - 1, str(2**63 - 1)), (pyarrow.string(), "1.10", "1.10"),
])  # fmt: skip
def test_a_number_of_a_table_has_its_own_digits(tmp_path, kind, value, text):
    if kind == pyarrow.float16():
        value = numpy.float16(value)
    table = pyarrow.table({"question": ["Q", "Q"], "answer": pyarrow.array([value, value], kind)})
    assert learned(write_parquet(tmp_path / "a.parquet", table)) == [text] * 2


def test_it_is_a_number_for_everything_else():
    number = parse_json("1.10", exact=True)
    assert isinstance(number, ExactFloat) and text_of(number) == "1.10"
    assert number == 1.1 and str(number) == repr(number) == json.dumps(number) == "1.1" and number + 1 == 2.1
    assert type(parse_json("1.5", exact=True)) is float and parse_json("1.10") == 1.1


def test_a_template_gets_the_numbers_that_transformers_gets(tmp_path):
    """Within messages they are values, not texts."""
    line = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "x": [1.10, 2e3]}]}'
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ m.x | tojson if m.x }}{{ m.x }}<|im_end|>\n{% endfor %}"
    )
    (rendered,) = read_examples(str(put(tmp_path / "a.jsonl", line)), "auto", -1, 1000, tokenizer).rendered
    assert "[1.1, 2000.0]" in rendered.text
    assert rendered.text == tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)


@pytest.mark.parametrize(
    "value, shown", [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")]
)
def test_no_number_of_a_table_is_learned(tmp_path, value, shown):
    rows = [{"question": "Q", "answer": 1.5, "score": 1.5}, {"question": "Q", "answer": 2.5, "score": value}]
    assert learned(write_parquet(tmp_path / "a.parquet", rows)) == ["1.5", "2.5"]  # not read: no harm
    rows[1]["answer"] = value
    with pytest.raises(
        UserError, match=rf"^--dataset .*a\.parquet row 2: column answer holds {shown} as a number"
    ):
        learned(write_parquet(tmp_path / "a.parquet", rows))


@pytest.mark.parametrize("cell", ["nan", "NaN", "inf", "-Infinity", " NaN "])
def test_nor_of_a_column_of_numbers_in_csv(tmp_path, cell):
    """In a column of texts it is a word."""
    numbers = put(tmp_path / "a.csv", f"question,answer\nQ,1.50\nQ,{cell}\nQ,\n")
    with pytest.raises(UserError, match=r"a\.csv:3: column answer holds -?(nan|inf) as a number"):
        learned(numbers)
    assert learned(put(tmp_path / "a.csv", f"question,answer,score\nQ,1.50,1\nQ,2,{cell}\n")) == ["1.50", "2"]
    assert learned(put(tmp_path / "a.csv", f"question,answer\nQ,Otto\nQ,{cell}\nQ,1\n")) == [
        "Otto",
        cell,
        "1",
    ]
    assert learned(put(tmp_path / "a.jsonl", jsonl([{"question": "Q", "answer": cell}]))) == [cell]
