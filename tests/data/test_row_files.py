"""data/row_files.py: numbers keep what the file says, and what no number means is never learned."""

from __future__ import annotations

import gzip
import json
import math

import numpy
import pyarrow
import pytest

from data import packed_files
from data.examples import read_examples
from data.hub_sets import read_hub
from data.reading import ReadingOptions
from options.errors import UserError
from options.exact_json import ExactFloat, number_text, parse_json
from options.generate import read_prompts
from options.limits import MAX_CONFIG_BYTES, read_json
from tests.helpers.data_files import TRICKY, read, to_jsonl, write_csv, write_file, write_parquet
from tests.helpers.small_tokenizers import BYTES, chat_tokenizer

NO_JSON = ["NaN", "Infinity", "-Infinity", "1e400", "-1e999", "1" + "0" * 400 + ".5"]
PLACES = ['{{"question": "Q", "answer": {}}}', '{{"question": "Q", "answer": "A", "score": {}}}',
          '{{"question": "Q", "answer": "A", "more": [{{"a": [1, {}]}}]}}']  # fmt: skip
GOOD = '{"question": "Is it NaN?", "answer": "Infinity"}'


PACK = {
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "list.json", "lines.json", "a.csv"])
def test_a_packed_file_has_the_rows_of_the_file_in_it(tmp_path, name, packing):
    text = to_jsonl(TRICKY).encode()
    if name == "list.json":
        text = json.dumps(TRICKY).encode()
    elif name == "a.csv":
        text = write_csv(tmp_path / "plain.csv", TRICKY).read_bytes()
    assert read(write_file(tmp_path / (name + packing), PACK[packing](text))) == TRICKY


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_files_in_two_parts_and_damaged_ones(tmp_path, packing):
    """Packers append by writing one archive behind the other."""
    path, packed = tmp_path / f"a.jsonl{packing}", PACK[packing](to_jsonl(TRICKY).encode())
    assert read(write_file(path, packed * 2)) == TRICKY * 2
    if packing == ".gz":  # as gzip(1) does, and the module of Python
        assert read(write_file(path, packed + bytes(1000))) == TRICKY
        assert read(write_file(path, packed + bytes(10) + packed)) == TRICKY * 2
    for damaged in (packed[:-9], packed + b"more", b"no archive", packed[:20] + b"\xff" * 9 + packed[29:]):
        with pytest.raises(UserError, match=rf"^--dataset .*a\.jsonl\{packing}: cannot be unpacked \("):
            read(write_file(path, damaged))
    line = PACK[packing](b'{"a": 1}\n{"a": NaN}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl\{packing}:2: not usable JSON \(NaN"):
        read(write_file(path, line))


def test_what_unpacks_to_fifty_times_its_size_is_refused(tmp_path, monkeypatch):
    """Beyond 16 MiB, which any file may unpack to."""
    packed = PACK[".gz"](to_jsonl(TRICKY * 2000).encode())
    path = write_file(tmp_path / "a.jsonl.gz", packed)
    assert len(read(path)) == 6000
    monkeypatch.setattr(packed_files, "MIN_UNPACKED_BYTES", 1000)
    with pytest.raises(
        UserError, match=r"a\.jsonl\.gz: unpacks to more than 50 times its size; unpack it first"
    ):
        read(path)


def learned(dataset) -> list[str]:
    rendered = read_examples(str(dataset), ReadingOptions(BYTES, context_length=1000)).rendered
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
            read(write_file(tmp_path / name, text))


@pytest.mark.parametrize("number", NO_JSON)
def test_nor_is_it_read_from_other_files(tmp_path, number):
    path = write_file(tmp_path / "config.json", f'{{"rope_theta": {number}}}')
    with pytest.raises(UserError, match=rf"config\.json: not a valid JSON file \({number[:9]}"):
        read_json(path, MAX_CONFIG_BYTES)
    path = write_file(tmp_path / "ask.jsonl", f'{GOOD}\n{{"question": {number}}}\n')
    with pytest.raises(UserError, match=rf"^--prompts .*ask\.jsonl:2: not JSON \({number[:9]}"):
        read_prompts(path)


@pytest.mark.parametrize(
    "text, line", [(json.dumps(json.loads(GOOD), indent=2), 1), (f"{GOOD}\n{GOOD * 2}", 2)]
)
def test_json_that_is_not_one_object_per_line_says_so(tmp_path, text, line):
    """Pretty-printed and concatenated objects."""
    for name, more in (("a.jsonl", ""), ("a.json", ", or is one list")):
        (tmp_path / name).write_text(text)
        error = rf"{name}:{line}: not JSON \(.*\); a \{name[1:]} file has one object per line{more}$"
        with pytest.raises(UserError, match=error):
            read(tmp_path / name)
    (tmp_path / "a.json").write_text(f"[{GOOD},]")
    with pytest.raises(UserError, match=r"a\.json:1: not JSON \([^)]*\)$"):
        read(tmp_path / "a.json")


def test_a_key_twice_has_no_value(tmp_path):
    path = write_file(tmp_path / "a.jsonl", f'{GOOD}\n{{"question": "Q", "answer": "A", "answer": "B"}}\n')
    with pytest.raises(
        UserError, match=r"a\.jsonl:2: not usable JSON \(the key 'answer' is repeated in an object"
    ):
        read(path)


NUMBERS = ["1.10", "4.0", "4", "1e5", "1E-7", "0.1", "-0.0", "-0", "-7", "0", "0.30000000000000004",
    "3.141592653589793238462643",
           "12345678901234567890123", "100000000000000000000000.0"]  # fmt: skip


def test_a_number_is_learned_as_it_is_written(tmp_path):
    lines = [f'{{"question": "Q", "answer": {number}}}' for number in NUMBERS]
    for path in (
        write_file(tmp_path / "a.jsonl", "\n".join(lines)),
        write_file(tmp_path / "a.json", f"[{','.join(lines)}]"),
    ):
        assert learned(path) == NUMBERS
    folder = write_file(tmp_path / "folder" / "a.jsonl", "\n".join(lines)).parent
    assert learned(folder) == NUMBERS
    assert (
        learned(write_file(tmp_path / "a.csv", "question,answer\n" + "".join(f"Q,{n}\n" for n in NUMBERS)))
        == NUMBERS
    )


@pytest.mark.parametrize("kind, value, text", [
    (pyarrow.float32(), 0.1, "0.1"), (pyarrow.float32(), 1e10, "10000000000.0"),
        (pyarrow.float16(), 0.1, "0.1"),
    (pyarrow.float16(), 1500, "1500.0"), (pyarrow.float16(), 65504, "65504.0"),
        (pyarrow.float16(), -0.0, "-0.0"),
    (pyarrow.float16(), 10008, "10008.0"), (pyarrow.float32(), 123456792.0, "123456792.0"),
    (pyarrow.float32(), 2**24, "16777216.0"), (pyarrow.float32(), -1234567.5, "-1234567.5"),
    (pyarrow.float32(), 1e-5, "1e-05"), (pyarrow.float32(), 3e38, "3e+38"),
        (pyarrow.float64(), 1500, "1500.0"),
    (pyarrow.float64(), 0.1, "0.1"), (pyarrow.int64(), 2**63 - 1, str(2**63 - 1)),
        (pyarrow.string(), "1.10", "1.10"),
])  # fmt: skip
def test_a_number_of_a_table_has_its_own_digits(tmp_path, kind, value, text):
    if kind == pyarrow.float16():
        value = numpy.float16(value)
    table = pyarrow.table({"question": ["Q", "Q"], "answer": pyarrow.array([value, value], kind)})
    assert learned(write_parquet(tmp_path / "a.parquet", table)) == [text] * 2


@pytest.mark.parametrize("inside, from_hub", [
    ("struct", False), ("list", False), ("list of structs", False), ("map", False),
    ("struct", True), ("list", True), ("list of structs", True),
])  # fmt: skip
@pytest.mark.parametrize("kind, value, shown", [
    (pyarrow.float32(), 0.1, "0.1"), (pyarrow.float32(), 21.7, "21.7"), (pyarrow.float64(), 0.1, "0.1"),
    (pyarrow.float32(), math.nan, "nan"), (pyarrow.float16(), numpy.float16(0.1), "0.1"),
])  # fmt: skip
def test_a_number_within_a_table_s_objects_has_its_own_digits(tmp_path, kind, value, shown, inside, from_hub):
    """As templates show it: the arguments of tool calls lie so deep."""
    nested, held = {
        "struct": (pyarrow.struct([("x", kind)]), {"x": value}),
        "list": (pyarrow.list_(kind), [value]),
        "list of structs": (pyarrow.list_(pyarrow.struct([("x", kind)])), [{"x": value}]),
        "map": (pyarrow.map_(pyarrow.string(), kind), [("x", value)]),
    }[inside]
    table = pyarrow.table({"deep": pyarrow.array([{"in": held}, None], pyarrow.struct([("in", nested)]))})
    path = write_parquet(tmp_path / "a.parquet", table)
    rows = read_hub(str(tmp_path), "a.parquet", "train", -1).rows if from_hub else read(path)
    found = rows[0]["deep"]["in"]
    while isinstance(found, list | dict):
        found = next(iter(found.values())) if isinstance(found, dict) else found[-1]
        found = found[-1] if isinstance(found, tuple) else found
    assert str(found) == shown and rows[1] == {"deep": None}


def test_a_call_of_a_table_shows_its_own_digits(tmp_path):
    """Arguments of a tool call and parameters of a tool, as transformers shows them of the numbers meant."""
    rows = [{
        "messages": [
            {"role": "user", "content": "Hi", "tool_calls": None},
            {"role": "assistant", "content": "Yo", "tool_calls": [
                {"type": "function",
                    "function": {"name": "heat", "arguments": {"to": 21.7, "by": [0.1, None]}}}]},
        ],
        "tools": [{"type": "function", "function": {"name": "heat", "parameters": {"default": 0.3}}}],
    }]  # fmt: skip
    table = pyarrow.Table.from_pylist(rows)
    narrow = table.cast(pyarrow.schema([(f.name, narrowed(f.type)) for f in table.schema]))
    assert "21.700000762939453" in str(narrow.to_pylist())
    tokenizer = chat_tokenizer(
        "{{ tools | tojson }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls | tojson"
        " if m.tool_calls }}"
        "<|im_end|>\n{% endfor %}"
    )
    path = write_parquet(tmp_path / "a.parquet", narrow)
    (rendered,) = read_examples(str(path), ReadingOptions(tokenizer, context_length=1000)).rendered
    assert rendered.text == tokenizer.apply_chat_template(
        rows[0]["messages"], tools=rows[0]["tools"], tokenize=False
    )


def narrowed(kind: pyarrow.DataType) -> pyarrow.DataType:
    """The type with 32 bits for each float, at every depth."""
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([(field.name, narrowed(field.type)) for field in kind])
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(narrowed(kind.value_type))
    return pyarrow.float32() if kind == pyarrow.float64() else kind


def test_it_is_a_number_for_everything_else():
    number = parse_json("1.10", exact=True)
    assert isinstance(number, ExactFloat) and number_text(number) == "1.10"
    assert number == 1.1 and str(number) == repr(number) == json.dumps(number) == "1.1" and number + 1 == 2.1
    assert type(parse_json("1.5", exact=True)) is float and parse_json("1.10") == 1.1
    zero = parse_json("-0", exact=True)
    assert zero == 0 and str(zero) == json.dumps(zero) == "0" and number_text(zero) == "-0"


def test_a_template_gets_the_numbers_that_transformers_gets(tmp_path):
    """Within messages they are values, not texts."""
    answer = '{"role": "assistant", "content": "Yo", "x": [1.10, 2e3]}'
    line = f'{{"messages": [{{"role": "user", "content": "Hi"}}, {answer}]}}'
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ m.x | tojson if m.x }}{{ m.x"
        " }}<|im_end|>\n{% endfor %}"
    )
    (rendered,) = read_examples(
        str(write_file(tmp_path / "a.jsonl", line)), ReadingOptions(tokenizer, context_length=1000)
    ).rendered
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


@pytest.mark.parametrize("cell", ["nan", "NaN", "inf", "-Infinity", " NaN ", "-nan"])
def test_nor_of_a_column_of_numbers_in_csv(tmp_path, cell):
    """In a column of texts it is a word."""
    for others in ("Q,1.50\n", 'Q,"1,000"\n', "Q,$5\n", "Q,12 kg\n", "Q,2026-11-29\n", "Q,1e5\n", "Q,\n"):
        numbers = write_file(tmp_path / "a.csv", f"question,answer\n{others}Q,{cell}\nQ,\n")
        with pytest.raises(UserError, match=r"a\.csv:3: column answer holds -?(nan|inf) as a number"):
            learned(numbers)
    assert learned(write_file(tmp_path / "a.csv", f"question,answer,score\nQ,1.50,1\nQ,2,{cell}\n")) == [
        "1.50",
        "2",
    ]
    assert learned(write_file(tmp_path / "a.csv", f"question,answer\nQ,Otto\nQ,{cell}\nQ,1\n")) == [
        "Otto",
        cell,
        "1",
    ]
    assert learned(write_file(tmp_path / "a.jsonl", to_jsonl([{"question": "Q", "answer": cell}]))) == [cell]
