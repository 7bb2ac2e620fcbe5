"""data/hub_sets.py: data sets in local folders, and what is no data set."""

from __future__ import annotations

import glob
import os
import re

import datasets
import pytest

from data import folder_files, hub_sets
from data.dataset_names import make_name_absolute
from data.sources import find_recipe
from options import generate
from options.errors import UserError
from tests.helpers.data_files import read, to_jsonl, write_file
from tests.helpers.set_folders import README, rows, written


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


NOT_DATA = {"README.md": "# Rows", "NOTES.md": "a\n", "LICENSE.txt": "MIT\n", "make.py": "",
    "config.json": "{}",
            ".hidden.csv": "a\n1\n", ".git/a.csv": "a\n1\n", "__pycache__/b.csv": "a\n1\n"}  # fmt: skip
WHOLE = {  # files, the answers that are read
    "one file": ({"a.jsonl": rows("1", "2")}, "12"),
    "several, by name": ({"b.jsonl": rows("3"), "a.jsonl": rows("1", "2"), "c/a.jsonl": rows("4")}, "1234"),
    "JSON in three spellings": ({"a.json": rows("1"), "B.JSONL": rows("2"), "c.ndjson": rows("3")}, "213"),
    "splits": ({"train.jsonl": rows("1"), "test.jsonl": rows("2"), "dev.jsonl": rows("3")}, "1"),
    "splits in folders": ({"train/a.csv": rows("1"), "train/b.csv": rows("2"), "test/a.csv": rows("3")},
        "12"),
    "shards": ({f"data/train-0000{i}-of-00002.parquet": rows(str(i)) for i in (0, 1)}, "01"),
    "beside what is no data": ({"a.csv": rows("1")} | NOT_DATA, "1"),
    "two kinds, of which README chooses": ({"a.csv": rows("1"), "b.jsonl": rows("2"), "README.md": README},
        "1"),
    "beside programs and logs": ({"rows.jsonl": rows("1"), "train.py": "", "train.log": "", "test.sh": ""},
        "1"),
    "packed": ({"a.jsonl.gz": rows("1", "2"), "b.jsonl": rows("3")}, "123"),
    "a README that begins late": ({"a.csv": rows("1"), "b.jsonl": rows("2"), "README.md": "\n" + README},
        "1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_a_folder_is_read_whole(tmp_path, case):
    files, answers = WHOLE[case]
    found = read(written(tmp_path / "data", files))
    assert "".join(str(row["answer"]) for row in found) == answers
    assert [row["answer"] for row in read(tmp_path / "data", 1)] == [found[0]["answer"]]


PART = {  # files, the words of the refusal
    "JSON and CSV": ({"a.jsonl": rows("1"), "b.csv": rows("2")}, "several kinds .*1 JSON.*1 CSV"),
    "most of one kind": ({"a.jsonl": rows("1"), "b.json": rows("2"), "c.CSV": rows("3")},
        r"\(2 JSON, 1 CSV\)"),
    "parquet": ({"a.json": rows("1"), "b.parquet": rows("2")}, "1 JSON, 1 parquet"),
    "in folders": ({"x/a.jsonl": rows("1"), "y/b.csv": rows("2")}, "1 JSON, 1 CSV"),
    "in splits": ({"train.jsonl": rows("1"), "test.csv": rows("2")}, "1 JSON.*1 CSV|1 CSV.*1 JSON"),
    "packed and not": ({"a.jsonl": rows("1"), "a.jsonl.gz": rows("1")}, r"a\.jsonl and a\.jsonl\.gz"),
    "more texts than rows": ({"a.jsonl": rows("1"), "b.txt": "b\n", "c.txt": "c\n"}, r"2 \.txt, 1 JSON"),
    "beside the splits": ({"train.jsonl": rows("1"), "more.jsonl": rows("2")},
        r"1 of its 2 .* more\.jsonl, belong"),
    "beside their folder": ({"train/a.csv": rows("1"), "b.csv": rows("2")},
        r"b\.csv, belong to no split \(train\)"),
    "beside shards": ({"data/train-00000-of-00001.parquet": rows("1"), "old.parquet": rows("2")},
        "old.parquet, belong"),
    "another split": ({"test.jsonl": rows("1")}, "has no split train, only test"),
}  # fmt: skip


@pytest.mark.parametrize("case", PART)
def test_a_folder_that_would_be_read_in_part(tmp_path, case):
    files, words = PART[case]
    folder = written(tmp_path / "data", files)
    with pytest.raises(
        UserError,
        match=f"^--dataset {folder}: .*({words}).*; name one file or a pattern [^,]*, or write",
    ) as error:
        read(folder)
    _, *pattern = str(error.value).removesuffix("'").split("'")[:2]
    assert bool(pattern) == (not any("test" in name for name in files))  # would join test rows to the others
    assert not pattern or read(pattern[0])


SHARDS = {f"train-0000{i}-of-00003.jsonl": rows(str(i)) for i in (0, 2)}


@pytest.mark.parametrize("pattern, answers", [
    ("*", None), ("**/*.jsonl", None), ("train-*-of-00003.jsonl", None), ("train-0000[0-2]-*", None),
    ("train-0000[02]-*", "02"), ("train-00000-*", "0"), ("train-????2*", "2"),
])  # fmt: skip
def test_a_pattern_that_would_match_a_missing_part(pattern, answers, tmp_path):
    """On the command line, in a recipe, and in a folder's README.md."""
    folder = written(tmp_path / "data", SHARDS)
    recipe = write_file(tmp_path / "mine.toml", f'source = "data"\ndata_files = "{pattern}"\n')
    more = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '{pattern}'\n"
    other = written(tmp_path / "other", SHARDS | {"README.md": f"---\n{more}---\n"})
    for dataset in (f"{folder}/{pattern}", recipe, other):
        if answers:
            assert [row["answer"] for row in read(dataset)] == [*answers]
            continue
        with pytest.raises(UserError, match=r"train-00001-of-00003\.jsonl is missing: 2 of 3 files; add it,"):
            read(dataset)


def test_links_and_odd_names(tmp_path):
    """A linked folder is not passed over, a circle of links is left, and names are no patterns."""
    written(tmp_path / "[1]*", {"a.jsonl": rows("1")})
    assert [row["answer"] for row in read(tmp_path / "[1]*")] == ["1"]
    folder = written(tmp_path / "data", {"a.jsonl": rows("1"), "b.jsonl": rows("2")})
    (folder / "circle").symlink_to(folder)
    (folder / "c.jsonl").symlink_to(tmp_path / "[1]*" / "a.jsonl")
    assert [row["answer"] for row in read(folder)] == ["1", "2", "1"]
    (folder / "more").symlink_to(tmp_path / "[1]*")
    assert [row["answer"] for row in read(folder)] == ["1", "2", "1", "1"]


def test_a_recipe_chooses(tmp_path):
    """By data_files, in a folder beside it; several kinds in the pattern are as bad as in the folder."""
    written(
        tmp_path / "mine",
        {"a.csv": rows("1"), "b.jsonl": rows("2"), "x/c.csv": rows("3"), "train.csv": rows("4")},
    )
    recipe = tmp_path / "mine.toml"
    for pattern, answers in (("*.csv", "14"), ("**/*.csv", "143"), ("b.jsonl", "2"), ("x/*", "3")):
        recipe.write_text(f'source = "mine"\ndata_files = "{pattern}"\n')
        assert "".join(row["answer"] for row in read(recipe)) == answers
    recipe.write_text('source = "mine"\ndata_files = "*"\n')
    with pytest.raises(UserError, match="2 CSV, 1 JSON"):
        read(recipe)
    (tmp_path / "inner").symlink_to("/etc")
    recipe.write_text('source = "inner"\n')
    with pytest.raises(UserError, match="source inner is not beside the recipe"):
        read(recipe)


LEADS_OUT = {  # how a folder beside a recipe leads out of where it lies, what the refusal says
    "a folder": (lambda rows: (rows / "x").symlink_to("/"),
        "rows/x: is a link out of the recipe's folder, to /;"),
    "a file": (lambda rows: (rows / "b.jsonl").symlink_to("../../mine.jsonl"),
        r"rows/b\.jsonl: is a link out"),
    "by way of a folder that does not": (
        lambda rows: (written(rows.parent / "more", {"note.md": ""}) / "y").symlink_to("../.."),
            "rows/more/y: is a link out",
    ),
    "README": (
        lambda rows: write_file(
            rows / "README.md", README.replace("*.csv", str(rows.parents[1] / "mine.jsonl"))
        ),
        r"its README\.md names .*mine\.jsonl, which is outside",
    ),
    "README, from above": (
        lambda rows: write_file(rows / "README.md", README.replace("*.csv", "../../mine.jsonl")),
            "README.md names .*mine",
    ),
}  # fmt: skip


@pytest.mark.parametrize("data_files", ["", "**/*.jsonl"])
@pytest.mark.parametrize("case", LEADS_OUT)
def test_a_recipe_s_folder_does_not_lead_out(tmp_path, case, data_files):
    """What is beside the recipe, it may lead to; a user's own --dataset anywhere."""
    write_file(tmp_path / "mine.jsonl", to_jsonl(rows("mine")))
    folder = written(tmp_path / "recipe" / "rows", {"a.jsonl": rows("1")})
    (folder / "more").symlink_to("../more")
    recipe = write_file(folder.parent / "a.toml", f'source = "rows"\ndata_files = "{data_files}"\n')
    assert [row["answer"] for row in read(recipe)] == ["1"]
    lead, words = LEADS_OUT[case]
    lead(folder)
    if data_files and case.startswith("README"):
        assert [row["answer"] for row in read(recipe)] == ["1"]  # which does not count
        return
    with pytest.raises(UserError, match=f"^--dataset .*{words}"):
        read(recipe)


def test_links_of_a_user_s_own_folder_are_bounded(tmp_path, monkeypatch):
    folder = written(tmp_path / "data", {"a.jsonl": rows("1"), "b/c.jsonl": rows("2")})
    written(tmp_path / "wide", {f"{i}.jsonl": rows("3") for i in range(9)})
    monkeypatch.setattr(folder_files, "MAX_FOLDER_ENTRIES", 4)
    assert [row["answer"] for row in read(folder)] == ["1", "2"]
    (folder / "x").symlink_to("../wide")
    with pytest.raises(UserError, match=f"^--dataset {folder}: more than 4 files and folders"):
        read(folder)


PATTERNS = ["*", "**", "**/*", "*.csv", "**/*.csv", "x/*", "x/**", "**/x/*", "**/**/c.csv", "*/*.csv",
    "x/[cd].csv",
            "?.csv", ".h/*", "**/.h/*", "x/.d.csv", "./x//c.csv", "z/*.csv", "absent", "X/*",
                "**/y/**/*.csv"]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_what_glob_says(tmp_path, pattern):
    folder = written(tmp_path / "[d]*", {name: [{"a": 1}] for name in (
        "a.csv", "b.csv", "x/c.csv", "x/y/c.csv", "x/y/d/e.csv", ".h/f.csv", "x/.d.csv", "x/y/.h/g.csv",
    )})  # fmt: skip
    (folder / "z").symlink_to("x")
    found = glob.glob(os.path.join(glob.escape(str(folder)), pattern), recursive=True)
    expected = sorted({os.path.normpath(path) for path in found if os.path.isfile(path)})
    assert folder_files.glob_data_files(str(folder), pattern) == expected
    for name in ("circle", "x/one", "x/two"):  # in which glob goes round, and takes twice as long with each
        (folder / name).symlink_to(folder)
    found = folder_files.glob_data_files(str(folder), pattern)
    assert found == expected


def test_texts_in_a_folder_stay_texts(tmp_path):
    """`datasets` makes numbers, dates and nothing of them."""
    texts = ["007", "1.10", "2026-11-29 10:00:00", "true", "NA", "null", "1e3"]
    for name in ("a.csv", "a.jsonl"):
        folder = written(tmp_path / name[2:], {name: rows(*texts)})
        assert [row["answer"] for row in read(folder)] == texts
    message = read_error(tmp_path / "jsonl", '{"question": "Q", "answer": "A"}\n{"question": }\n')
    error = "not JSON (Expecting value); a .jsonl file has one object per line"
    assert message == f"--dataset {tmp_path}/jsonl/a.jsonl:2: {error}"


def read_error(folder, text: str) -> str:
    (folder / "a.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        read(folder)
    return str(error.value)


def test_folders_without_rows(tmp_path, caplog):
    for name, files, why in (
        ("a", {"b/script.py": "raise SystemExit"}, ""),
        ("b", {"b.py": "raise SystemExit"}, "script"),
    ):
        folder = written(tmp_path / name, files)
        with pytest.raises(UserError, match=rf"^--dataset {folder}: could not be loaded \(.*{why}.*\)$"):
            read(folder)
    assert caplog.records == []  # the one line says it


UNREAD = {  # name: what to do
    "a.jsonl.bz2": r"\.jsonl\.bz2 files are not read .*unpack it first",
    "A.JSONL.BZ2": r"\.jsonl\.bz2 files .*unpack",
    "a.parquet.zst": r"\.parquet\.zst files .*unpack",
    "a.zip": r"\.zip files .*unpack",
    "a.json.xz": r"\.json\.xz files .*unpack",
    "a.tsv": r"\.tsv files .*write it as \.csv",
    "a.txt": r"\.txt files .*make a \.jsonl",
    "a.arrow": r"\.arrow files .*as \.parquet",
    "a.xlsx": r"\.xlsx files .*as \.csv",
    "a.pkl": r"\.pkl files .*nothing is unpickled",
    "rows": "it has no suffix",
    "rows.mine": r"\.mine files are not read",
}


def as_shown(dataset: str) -> str:
    """A pattern for a path in a message, which may leave a first ./ out."""
    return "(./)?" + re.escape(dataset.removeprefix("./"))


@pytest.mark.parametrize("name", UNREAD)
def test_a_file_of_another_kind_is_told(tmp_path, monkeypatch, name):
    """Wherever a data set may be named, and however its path is written."""
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path / "data" / name, "{}\n")
    for dataset in (f"data/{name}", f"./data/{name}", str(tmp_path / "data" / name)):
        with pytest.raises(UserError, match=f"^--dataset {as_shown(dataset)}: {UNREAD[name]}"):
            find_recipe(dataset)


@pytest.mark.parametrize("name", [name for name in UNREAD if not name.startswith("rows")])
def test_a_recipe_of_such_a_file(tmp_path, name):
    recipe = write_file(tmp_path / "mine.toml", f'source = "{name}"\n')
    for _ in range(2):  # without the file, and with it
        with pytest.raises(UserError, match=f"^--dataset {recipe}: source {re.escape(name)}: {UNREAD[name]}"):
            find_recipe(str(recipe))
        write_file(tmp_path / name, "{}\n")


@pytest.mark.parametrize("dataset", [
    "absent.jsonl", "absent.ndjson", "ABSENT.CSV", "absent/a.csv", "absent.toml", "absent.parquet",
        "./absent/x.jsonl",
    "absent/x.jsonl.gz", "absent/x.tsv", "absent.jsonl.zst", "./absent", "../absent/x", "/absent/x",
        "~/absent", "~nobody", "a/b/c", "absent/",
    "https://example.invalid/a",
])  # fmt: skip
def test_an_absent_path_is_no_hub_id(dataset, monkeypatch):
    monkeypatch.setattr("data.sources.read_hub", None)
    with pytest.raises(UserError, match=f"^--dataset {as_shown(dataset)}: [Nn]o such file"):
        read(dataset)


@pytest.mark.parametrize("name, words", [
    ("a.json", r"\.json files are not read; write a line for each prompt, or a row as \.jsonl"),
    ("a.CSV", r"\.csv files are not read"),
    ("a.parquet", r"\.parquet files are not read"),
    ("a.jsonl.gz", r"\.jsonl\.gz files are not read"),
    ("a.tsv", r"\.tsv files are not read"),
])  # fmt: skip
def test_prompts_of_another_kind(tmp_path, name, words):
    with pytest.raises(
        UserError, match=f"^--prompts {re.escape(str(write_file(tmp_path / name, '[1]')))}: {words}"
    ):
        generate.read_prompts(tmp_path / name)


def test_prompts_are_rows_or_lines(tmp_path):
    line = '{"instruction": "Say 1."}\n'
    for name in ("a.jsonl", "A.JSONL", "a.ndjson"):
        assert [p.content for p in generate.read_prompts(write_file(tmp_path / name, line))] == [
            {"instruction": "Say 1."}
        ]
    for name in ("a.txt", "A.TXT", "a.md", "a"):
        assert [p.content for p in generate.read_prompts(write_file(tmp_path / name, line))] == [line.strip()]


CSV = "question,answer\nzip of Adjuntas?,00601\nversion?,1.10\nid?,12345678901234567890\n"


@pytest.mark.parametrize(
    "entry, exact", [("", True), ("  description: all\n", True), ("  sep: ','\n", False)]
)
def test_files_that_a_readme_names_are_read_exactly(entry, exact, tmp_path):
    """Unless it also says how to read them: `datasets` does, and sees numbers."""
    files = "  data_files:\n  - split: train\n    path: a.csv\n"
    config = f"---\nconfigs:\n- config_name: default\n{entry}{files}---\n"
    folder = written(tmp_path / "data", {"a.csv": CSV, "b.csv": CSV, "README.md": config})
    read = hub_sets.read_folder(str(folder), "", "train", -1)
    answers = ["00601", "1.10", "12345678901234567890"]
    assert len(read.rows) == 3 and ([row["answer"] for row in read.rows] == answers) == exact
    becomes = "as numbers (007 becomes 7, 1.10 becomes 1.1): answer"
    told = f"data: `datasets` reads these columns of {folder} {becomes}"
    assert read.remarks == (() if exact else (told,))


@pytest.mark.parametrize("default", ["", "  default: true\n"])
def test_other_configurations_are_told(default, tmp_path):
    readme = f"---\nconfigs:\n- config_name: default\n{default}  data_files: en.jsonl\n"
    readme += "- config_name: german\n  data_files: de.jsonl\n---\n"
    folder = written(tmp_path / "data", {"en.jsonl": rows("1"), "de.jsonl": rows("2"), "README.md": readme})
    read = hub_sets.read_folder(str(folder), "", "train", -1)
    assert [row["answer"] for row in read.rows] == ["1"]
    assert read.remarks == (f"data: only the configuration default of {folder} is read, not german",)


def test_a_set_without_one_of_its_files_is_refused(tmp_path):
    names = [f"data/train-{i:05d}-of-00003.jsonl" for i in range(3)]
    folder = written(tmp_path / "data", {names[0]: rows("0"), names[2]: rows("2")})
    with pytest.raises(
        UserError, match=r"data/train-00001-of-00003\.jsonl is missing: 2 of 3 files; add it, name one"
    ):
        hub_sets.read_folder(str(folder), "", "train", -1)
    assert len(hub_sets.read_folder(str(folder), "data/train-0000[02]*", "train", -1).rows) == 2  # as asked
    written(folder, {names[1]: rows("1")})
    read = hub_sets.read_folder(str(folder), "", "train", -1)
    assert [row["answer"] for row in read.rows] == ["0", "1", "2"]


def test_files_without_a_suffix_are_told(tmp_path):
    folder = written(tmp_path / "data", {"a.jsonl": rows("1"), "part-00001": rows("2"), "LICENSE": "MIT"})
    told = f"data: of {folder} files without a suffix are not read: part-00001"
    assert hub_sets.read_folder(str(folder), "", "train", -1).remarks == (told,)


def test_splits_that_are_not_read_are_told(tmp_path):
    folder = written(tmp_path / "data", {"train.jsonl": rows("1"), "test.jsonl": rows("2")})
    told = f"data: only the split train of {folder} is read, not test"
    assert hub_sets.read_folder(str(folder), "", "train", -1).remarks == (told,)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---\n")
    assert hub_sets.read_folder(str(folder), "", "train", -1).remarks == ()  # one split, as its author says
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        "  - split: test\n    path: test.jsonl\n---\n"
    )
    assert hub_sets.read_folder(str(folder), "", "train[:1]", -1).remarks == (
        f"data: only the split train[:1] of {folder} is read, not test",
    )


def test_a_pattern_on_the_command_line(tmp_path, monkeypatch):
    """Its files are sorted; nothing that matches, several kinds and parts of a set are errors."""
    folder = written(tmp_path / "[x] a,b*2@c" / "data", {
        "train-2.jsonl": rows("3"), "train-10.jsonl.gz": rows("1"), "train-11.jsonl.zst": rows("2"),
        "test-1.jsonl": rows("4"), "more/train-3.jsonl": rows("5"), "train.md": "#", "old.csv": rows("6"),
    })  # fmt: skip
    monkeypatch.chdir(folder.parent)
    for name in ("data/train-*", f"{folder}/train-*", "./data/train-[12]*.jsonl*"):
        assert [row["answer"] for row in read(name)] == ["1", "2", "3"]
        assert [row["answer"] for row in read(make_name_absolute(name))] == ["1", "2", "3"]
    assert [row["answer"] for row in read("data/**/train-?.jsonl")] == ["5", "3"]
    assert os.path.isabs(make_name_absolute("data/train-*"))
    for name, words in (
        ("data/valid-*.jsonl", "data/valid-.*jsonl: matches no data file"),
        ("data/*.md", r"data/\*\.md: matches no data file"),
        ("data/*", "several kinds .*5 JSON, 1 CSV|several kinds"),
        ("data/train-*::test", "data/train-.* is a local folder|has no split test"),
        ("data/train-*@v1", "is a local folder, which has no revision v1"),
    ):
        with pytest.raises(UserError, match=f"^--dataset .*({words})"):
            read(name)
    write_file(folder / "train-*", "")  # a file of this name
    with pytest.raises(UserError, match="it has no suffix"):
        read("data/train-*")


def test_a_split_or_configuration_of_a_folder(tmp_path):
    folder = written(tmp_path / "a:b@c", {"train.jsonl": rows("1"), "dev.jsonl": rows("2")})
    assert [row["answer"] for row in read(f"{folder}::validation")] == ["2"]
    assert make_name_absolute(f"{folder}::validation") == f"{folder}::validation"
    for part, words in (
        ("::test", "has no split test, only train, validation"),
        (":german", "has no configuration german: its README.md names none"),
        ("::train[:5]", r"train\[:5\] is not the name of one split; --dataset_samples takes the first rows"),
        ("::train+dev", r"train\+dev is not the name of one split; .* and a comma joins splits"),
        ("@main", "is a local folder, which has no revision main"),
    ):
        with pytest.raises(UserError, match=f"^--dataset {folder}.*: .*{words}"):
            read(f"{folder}{part}")
    with pytest.raises(UserError, match="is one file, which has no split train"):
        read(f"{folder}/train.jsonl::train")
    readme = "---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n"
    readme += "- config_name: german\n  data_files:\n  - split: test\n    path: dev.jsonl\n---\n"
    written(folder, {"README.md": readme})
    assert [row["answer"] for row in read(folder)] == ["1"]
    assert [row["answer"] for row in read(f"{folder}:german:test")] == ["2"]
    for part, words in (
        (":french", "has no configuration french, only default, german"),
        (":german", "has no split train, only test"),
    ):
        with pytest.raises(UserError, match=f"^--dataset {folder}: {words}"):
            read(f"{folder}{part}")
    written(folder, {"README.md": readme.replace("default", "english")})
    words = (
        f"has several configurations, none of which is the default; name one, as in {folder}:english: english"
    )
    with pytest.raises(UserError, match=f"^--dataset {folder}: {words}, german$"):
        read(folder)
