"""data/sources.py: the recipes of datasets/, files of every type, and data sets of the hub."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from benchmarks.make_checkpoint import byte_tokenizer
from data.reading import ReadingOptions
from data.sources import RECIPE_FOLDER, Recipe, find_recipe
from data.tokenizing import tokenize_dataset
from options.errors import UserError
from tests.helpers.data_files import TRICKY, read, to_jsonl, write_csv, write_file, write_parquet
from tests.helpers.small_tokenizers import BYTES

REPOSITORY = Path(__file__).parents[2]


def answers(rows) -> list[str]:
    """The learned text of each example."""
    cuts = zip(
        rows.tokens.tensor_split(rows.starts[1:-1]), rows.learned.tensor_split(rows.starts[1:-1]), strict=True
    )
    return [BYTES.decode(tokens[learned]) for tokens, learned in cuts]


DOCUMENTED = {
    "toy": Recipe("toy.jsonl", format="alpaca"),
    "toy_vision": Recipe(str(RECIPE_FOLDER / "toy_vision"), root=str(RECIPE_FOLDER)),
    "alpaca": Recipe("yahma/alpaca-cleaned", format="alpaca"),
    "alpaca_sample": Recipe("yahma/alpaca-cleaned", format="alpaca", samples=512),
    "dummy": Recipe(format="alpaca", samples=512,
        fill={"instruction": "instruction", "input": "input", "output": "output "}),
    "guanaco": Recipe("timdettmers/openassistant-guanaco", format="guanaco"),
    "sql": Recipe("knowrohit07/know_sql", "validation", format="qa"),
    "orca_math": Recipe("microsoft/orca-math-word-problems-200k", format="qa"),
    "uganda_clinical_guidelines": Recipe("silvaKenpachi/uganda_clinical_guidelines", format="alpaca"),
    "oig_chip2": Recipe("laion/OIG", data_files="unified_chip2.jsonl", format="guanaco",
        markers=["<human>:", "<bot>:"]),
    "medpix": Recipe("mmoukouba/MedPix-Grouped-QA", columns={"image": "image"}),
    "medpix_vqa": Recipe("mmoukouba/MedPix-VQA", columns={"image": "image_id"}),
    "medpix_shortqa": Recipe("adishourya/MEDPIX-ShortQA", "Train", columns={"image": "image_id"}),
}  # fmt: skip


def test_the_recipes_are_those_of_the_documentation():
    found = {
        path.stem: find_recipe(path.stem)[0] for path in RECIPE_FOLDER.iterdir() if path.suffix == ".toml"
    }
    assert found == DOCUMENTED
    assert {path.suffix for path in RECIPE_FOLDER.rglob("*") if path.is_file()} == {
        ".toml",
        ".jsonl",
    }  # never a .py: see the design


def test_toy_is_what_its_tool_writes(tmp_path):
    tool = REPOSITORY / "tools" / "make_toy_dataset.py"
    subprocess.run(
        [sys.executable, tool, tmp_path / "toy.jsonl"], check=True, capture_output=True, timeout=60
    )
    assert (tmp_path / "toy.jsonl").read_bytes() == (RECIPE_FOLDER / "toy.jsonl").read_bytes()
    rows = read("toy")
    assert len(rows) >= 500
    assert len({tuple(row.values()) for row in rows}) == len(rows)


# recipe -> the hub's file, its rows, what is learned of them
CITY = {"instruction": "Name a city.", "input": "", "output": "Paris"}
CHIP2 = {"text": "\n<human>: Hi\n<bot>: Yo", "metadata": {"source": "chip2"}}
HUB = {
    "alpaca": ("yahma/alpaca-cleaned/train.jsonl", [CITY, CITY | {"output": ""}], ["Paris</s>"]),
    "alpaca_sample": ("yahma/alpaca-cleaned/train.jsonl", [CITY] * 600, ["Paris</s>"] * 512),
    "guanaco": ("timdettmers/openassistant-guanaco/openassistant_best_replies_train.jsonl",
                [{"text": "### Human: Hi### Assistant: Yo### Human: Bye### Assistant: Ciao"}],
                    [" Yo Ciao</s>"]),
    "sql": ("knowrohit07/know_sql/validation.json",
            [{"context": "CREATE TABLE t (x INT)", "question": "How many?", "answer": "SELECT 1"}],
                ["SELECT 1</s>"]),
    "orca_math": ("microsoft/orca-math-word-problems-200k/data/train-00000-of-00001.jsonl",
                  [{"question": "2+2?", "answer": "4."}], ["4.</s>"]),
    "uganda_clinical_guidelines": ("silvaKenpachi/uganda_clinical_guidelines/train.jsonl",
                                   [CITY | {"input": None}, CITY], ["Paris</s>"] * 2),
    "oig_chip2": ("laion/OIG/unified_chip2.jsonl", [CHIP2], [" Yo</s>"]),
}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working folder in which a folder named like a hub id stands for that data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize("name", HUB)
def test_recipes_of_the_hub(hub, name):
    file, rows, learned = HUB[name]
    write_file(hub / file, to_jsonl(rows))
    # Other files and splits of the repository, which must not be read.
    others = {
        "sql": "train.json",
        "oig_chip2": "unified_other.jsonl",
        "orca_math": "test-00000-of-00001.jsonl",
    }
    other = others.get(name, "test.jsonl")
    write_file((hub / file).with_name(other), to_jsonl([dict.fromkeys(rows[0], "wrong")]))
    prepared = tokenize_dataset(name, ReadingOptions(BYTES, context_length=1000))
    assert answers(prepared) == learned
    assert prepared.dropped == min(len(rows), 512) - len(learned)


def test_a_folder_by_its_path_and_a_hub_id_without_a_recipe(hub, monkeypatch):
    write_file(
        hub / "some" / "data" / "train.jsonl",
        to_jsonl([{"question": str(i), "answer": "yes"} for i in range(9)]),
    )
    for dataset in (hub / "some" / "data", "some/data", "~/data"):
        monkeypatch.setenv("HOME", str(hub / "some"))
        assert [row["question"] for row in read(dataset, 3)] == ["0", "1", "2"]
        assert (
            answers(tokenize_dataset(str(dataset), ReadingOptions(BYTES, samples=2, context_length=1000)))
            == ["yes</s>"] * 2
        )


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub_is_said_at_once(hub, monkeypatch, offline):
    """offline=False: the user did not say so; one question to the hub (conftest cuts it off) finds out."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    start = time.perf_counter()
    with pytest.raises(
        UserError,
        match=r"^--dataset nobody/nothing: could not be loaded .*Couldn't reach.* on the Hub.*; nor is"
        r" there a file or"
        " folder of that name$",
    ):
        read("nobody/nothing")
    assert time.perf_counter() - start < 5
    assert datasets.config.HF_HUB_OFFLINE  # or load_dataset, with no such cut, retries for more than 20 s


WRITERS = {
    "a.jsonl": lambda p: write_file(p, to_jsonl(TRICKY)),
    "escaped.jsonl": lambda p: write_file(p, "\n".join(map(json.dumps, TRICKY))),
    "blank lines.jsonl": lambda p: write_file(p, "\n" + to_jsonl(TRICKY).replace("}\n", "}\r\n\r\n")),
    "list.json": lambda p: write_file(p, "\n " + json.dumps(TRICKY, indent=2)),
    "lines.json": lambda p: write_file(p, to_jsonl(TRICKY)),
    "bom.jsonl": lambda p: write_file(p, b"\xef\xbb\xbf" + to_jsonl(TRICKY).encode()),
    "bom.json": lambda p: write_file(p, b"\xef\xbb\xbf" + json.dumps(TRICKY).encode()),
    "a.csv": lambda p: write_csv(p, TRICKY),
    "bom.csv": lambda p: write_file(p, b"\xef\xbb\xbf" + write_csv(p, TRICKY).read_bytes()),
    "quoted.csv": lambda p: write_csv(p, TRICKY, quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "a.parquet": lambda p: write_parquet(p, TRICKY),
    "a.ndjson": lambda p: write_file(p, to_jsonl(TRICKY)),
    "A.JSONL": lambda p: write_file(p, to_jsonl(TRICKY)),
    "A.NdJson": lambda p: write_file(p, to_jsonl(TRICKY)),
    "LIST.JSON": lambda p: write_file(p, json.dumps(TRICKY)),
    "A.CSV": lambda p: write_csv(p, TRICKY),
    "A.Parquet": lambda p: write_parquet(p, TRICKY),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_any_type_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == TRICKY
    assert read(tmp_path / name, samples=2) == TRICKY[:2]
    assert read(tmp_path / name, samples=9) == TRICKY


def test_parquet_holds_conversations(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    write_parquet(tmp_path / "a.parquet", [{"messages": messages}])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    rows = tokenize_dataset(str(tmp_path / "a.parquet"), ReadingOptions(tokenizer, context_length=100))
    assert tokenizer.decode(rows.tokens[rows.learned]) == "assistant: Yo</s>"  # it has no generation prompt
    with pytest.raises(UserError, match=r"a\.parquet row 1: the tokenizer has no chat template"):
        tokenize_dataset(str(tmp_path / "a.parquet"), ReadingOptions(BYTES, context_length=100))


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"a": 1}\n\n{"a": }\n', r"a\.jsonl:3: not JSON"),
    ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2: not a JSON object"),
    ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: JSON nested too deeply"),
    ("a.json", '[{"a": 1},\n' + '{"a":' * 100_000, r"a\.json:2: JSON nested too deeply"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"a\.jsonl:2: not UTF-8"),
    ("a.jsonl", "\n", r"a\.jsonl: is empty"),
    ("a.json", "[]", r"a\.json: is empty"),
    ("a.json", '[\n{"a": 1},\n{"a" 1}]', r"a\.json:3: not JSON"),
    ("a.json", '[{"a": 1}, 2]', r"a\.json: entry 2 is not a JSON object"),
    ("a.csv", "a,b\n", r"a\.csv: is empty"),
    ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: another number of columns"),
    ("a.csv", "a,b\n1,2,3\n", r"a\.csv:2: another number of columns"),
    ("a.csv", 'a,b\n"1"x,2\n', r"a\.csv:2: not CSV"),
    ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv:1: the header names a column twice"),
    ("a.parquet", "no", r"a\.parquet: not a parquet file"),
])  # fmt: skip
def test_malformed_files_are_refused_with_the_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=f"^--dataset .*{message}"):
        read(write_file(tmp_path / name, content))


def test_a_row_s_place_is_the_line_it_is_on(tmp_path):
    file = write_file(tmp_path / "a.jsonl", "\n" + to_jsonl([CITY]) + "\n" + to_jsonl([{"instruction": "x"}]))
    with pytest.raises(UserError, match=r"a\.jsonl:4: column output is missing or empty"):
        tokenize_dataset(str(file), ReadingOptions(BYTES, context_length=100))


def test_a_recipe_of_the_user_s_own(tmp_path):
    write_file(
        tmp_path / "rows.jsonl",
        to_jsonl([{"answer": "Q", "reply": "A", "id": 1}, {"answer": "R", "reply": "B"}]),
    )
    recipe = write_file(tmp_path / "mine.toml", (
        'source = "rows.jsonl"\nsamples = 1\ncolumns = { question = "answer", answer = "reply" }\n'
    ))  # fmt: skip
    assert answers(tokenize_dataset(str(recipe), ReadingOptions(BYTES, context_length=100))) == [
        "A</s>"
    ]  # its own number of samples
    assert answers(tokenize_dataset(str(recipe), ReadingOptions(BYTES, samples=2, context_length=100))) == [
        "A</s>",
        "B</s>",
    ]
    assert [row["question"] for row in read(recipe)] == [
        "Q",
        "R",
    ]  # renamed, though it had an `answer` before


def test_a_recipe_names_stanfords_prompt(tmp_path):
    """The option goes before the recipe, and nothing else chooses it."""
    rows = write_file(tmp_path / "rows.jsonl", to_jsonl([CITY]))
    recipe = write_file(tmp_path / "mine.toml", 'source = "rows.jsonl"\nformat = "alpaca_stanford"\n')
    stanfords = {
        (dataset, name)
        for dataset in (rows, recipe)
        for name in ("auto", "alpaca", "alpaca_stanford")
        if "### Response:Paris"
        in BYTES.decode(
            tokenize_dataset(str(dataset), ReadingOptions(BYTES, format=name, context_length=1000)).tokens
        )
    }
    assert stanfords == {(recipe, "auto"), (recipe, "alpaca_stanford"), (rows, "alpaca_stanford")}


def test_a_recipe_s_markers_tell_its_format(tmp_path):
    write_file(tmp_path / "rows.jsonl", to_jsonl([{"text": "<u> Hi <b> Yo"}]))
    recipe = write_file(tmp_path / "mine.toml", 'source = "rows.jsonl"\nmarkers = ["<u>", "<b>"]\n')
    assert answers(tokenize_dataset(str(recipe), ReadingOptions(BYTES, context_length=100))) == [" Yo</s>"]


@pytest.mark.parametrize("text, message", [
    ("sauce = 'rows.jsonl'", "unknown key sauce; a recipe has source, split"),
    ("source = 'rows.jsonl'\nsamples = 'all'", "samples must be like -1"),
    ("source = 'rows.jsonl'\nsamples = true", "samples must be like -1"),
    ("source = 'rows.jsonl'\nmarkers = 'ab'", "markers must be like"),
    ("source = 'rows.jsonl'\nmarkers = ['a']", "markers two texts"),
    ("source = 'rows.jsonl'\ncolumns = {output = 1}", "columns must be like"),
    ("source = 'rows.jsonl'\nformat = 'alpacka'", "format must be one of chat, alpaca"),
    ("source = 'rows.jsonl'\ncolumns = {output = 'reply'}", "recipe: the data has no column reply; its"),
    ("format = 'alpaca'", "needs either a source or"),
    ("fill = {instruction = 'x'}", "needs either a source or"),
    ("source = 'absent.jsonl'", r"absent\.jsonl: no such file"),
    ("source = ", r"not a recipe \(Invalid value"),
])  # fmt: skip
def test_malformed_recipes_are_refused(tmp_path, text, message):
    write_file(tmp_path / "rows.jsonl", to_jsonl([CITY]))
    with pytest.raises(UserError, match=f"^--dataset {tmp_path}.*{message}"):
        read(write_file(tmp_path / "mine.toml", text))


@pytest.mark.parametrize("address, advice", [
    ("https://huggingface.co/datasets/o/n", "the hub's data set is o/n"),
    ("https://huggingface.co/datasets/o/n.v1/tree/main/data?x=1", "the hub's data set is o/n.v1@main"),
    ("https://hf.co/datasets/o/n/viewer", "the hub's data set is o/n"),
    ("huggingface.co/datasets/o/n/", "the hub's data set is o/n"),
    ("hf://datasets/o/n", "the hub's data set is o/n"),
    ("https://huggingface.co/datasets/o/n/resolve/v1/a.jsonl", "the hub's data set is o/n@v1"),
    ("https://a.invalid/rows.jsonl", "download the file, and give its path"),
])  # fmt: skip
def test_the_address_of_a_data_set(address, advice):
    with pytest.raises(UserError) as error:
        find_recipe(address)
    assert str(error.value) == f"--dataset {address}: no such file or folder; {advice}"


@pytest.mark.parametrize("dataset", ["alpacka", "", "x" * 300, "a\0b"])
def test_unknown_names_are_refused(dataset):
    with pytest.raises(UserError, match=r"not a recipe \(alpaca, alpaca_sample, dummy, .*owner/name"):
        find_recipe(dataset)
