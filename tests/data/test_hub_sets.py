"""data/hub_sets.py: data sets of the hub, and the names and revisions that lead there."""

from __future__ import annotations

import shutil

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import RevisionNotFoundError

from data import hub_revisions, hub_sets
from data.evaluation_sets import prepare_sets
from data.sources import find_recipe, load_rows
from files.model_folder import find_model
from options.errors import UserError
from options.train import parse
from tests.helpers.data_files import read, write_file
from tests.helpers.hub_cache import FIRST, SECOND, add_set_to_hub_cache, raise_connection_error
from tests.helpers.set_folders import README, rows, written
from tests.helpers.small_tokenizers import BYTES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


REPOSITORY = ["a.csv", "b.jsonl", "c.jsonl", "README.md"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository, me/rows, of one row."""
    path = written(tmp_path, {"a.csv": rows("one")}) / "a.csv"
    builder = datasets.load_dataset_builder("csv", data_files=str(path))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_revisions, "find_commit", lambda *_: (FIRST, True))


@pytest.mark.parametrize("names, readme, told", [
    (REPOSITORY, "# Rows", "data: me/rows has data files of several kinds (2 JSON, 1 CSV), of which one is"
        " read; write a recipe"),
    (REPOSITORY, README, ""),
    (["a.csv", "b.csv", "README.md"],
     README.replace("---\n# Rows", "- config_name: more\n  data_files: b.csv\n---\n"),
     "data: only the configuration default of me/rows is read, not more"),
    (["a.csv", "README.md", "pictures.txt.md"], "# Rows", ""),
])  # fmt: skip
def test_of_which_kinds_a_hub_repository_is(names, readme, told, hub, tmp_path, monkeypatch):
    """Its author's part is read, and what is left is told."""
    path = write_file(tmp_path / "README.md", readme)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(path))
    read = hub_sets.read_hub("me/rows", "", "train", -1)
    assert read.rows == [{"question": "Q", "answer": "one"}]
    assert len(read.remarks) == bool(told) and "".join(read.remarks).startswith(told)


def test_a_connection_that_ends_costs_the_remark_only(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", raise_connection_error)
    assert hub_sets.read_hub("me/rows", "", "train", -1).rows == [{"question": "Q", "answer": "one"}]


def test_a_connection_that_ends_before_there_are_rows(hub, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_connection_error)
    monkeypatch.setattr(datasets, "load_dataset_builder", raise_connection_error)
    with pytest.raises(
        UserError, match=r"^--dataset me/rows: could not be loaded \(gone\); nor is there a file"
    ):
        hub_sets.read_hub("me/rows", "", "train", -1)
    with pytest.raises(
        UserError, match=r"^--model_name me/model: could not be fetched from the hub \(gone\)"
    ):
        find_model("me/model")


TWO_CONFIGS = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: en.jsonl}
  - {split: validation, path: more.jsonl}
- config_name: german
  data_files: de.jsonl
---
"""


@pytest.fixture
def cached_set(tmp_path, monkeypatch):
    """The hub's cache with me/rows, of which v1 and main are different commits; its files' folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    files = {"en.jsonl": rows("1"), "more.jsonl": rows("2"), "de.jsonl": rows("3"), "README.md": TWO_CONFIGS}
    folder = written(tmp_path / "rows", files)
    add_set_to_hub_cache(tmp_path / "cache", "me/rows", folder, SECOND, "main", "a-branch")
    written(folder, {"en.jsonl": rows("old"), "de.jsonl": rows("alt")})
    add_set_to_hub_cache(tmp_path / "cache", "me/rows", folder, FIRST, "v1")  # read last, yet not the newest
    return folder


SPELLINGS = {  # the answers that are read, and the name that config.yaml records
    "me/rows": ("1", f"me/rows@{SECOND}"),
    "me/rows@main": ("1", f"me/rows@{SECOND}"),
    "me/rows@v1": ("old", f"me/rows@{FIRST}"),
    f"me/rows@{FIRST}": ("old", f"me/rows@{FIRST}"),
    "me/rows:german": ("3", f"me/rows:german@{SECOND}"),
    "me/rows:german@v1": ("alt", f"me/rows:german@{FIRST}"),
    "me/rows:default:validation": ("2", f"me/rows:default:validation@{SECOND}"),
    "me/rows::validation": ("2", f"me/rows::validation@{SECOND}"),
    "me/rows::train@a-branch": ("1", f"me/rows::train@{SECOND}"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_hub_set(name, cached_set, checkpoints):
    """A run's config.yaml has the commit, and the name in it gives the same rows when main has moved."""
    answer, recorded = SPELLINGS[name]
    assert [row["answer"] for row in read(name)] == [answer]
    assert [row["answer"] for row in read(recorded)] == [answer]
    more = ["--eval_dataset", name, "--sample_every", "1", "--sample_prompts", name]
    config, _ = parse(["--model_name", str(checkpoints()), "--dataset", name, *more])
    config = prepare_sets(config, BYTES)[0]
    assert config.dataset == config.eval_dataset == config.sample_prompts == recorded


def test_the_cache_of_some_files_is_not_that_of_the_set(cached_set, tmp_path):
    """A recipe with data_files has read the first commit, and nobody the whole of it."""
    cache = tmp_path / "cache" / "me___rows"
    kwargs = {"data_files": "de.jsonl"}
    files = cache / datasets.BuilderConfig("default").create_config_id(kwargs) / "0.0.0" / FIRST
    shutil.copytree(cache / "german" / "0.0.0" / FIRST, files)
    recipe = write_file(tmp_path / "mine.toml", 'source = "me/rows"\ndata_files = "de.jsonl"\n')
    assert [row["answer"] for row in read(f"{recipe}@v1")] == ["alt"]
    with pytest.raises(UserError, match=r"lacks de\.jsonl of this revision"):
        read(f"{recipe}@{SECOND}")
    shutil.rmtree(cache / "default" / "0.0.0" / FIRST)
    shutil.rmtree(cache / "german" / "0.0.0" / FIRST)
    with pytest.raises(UserError, match="lacks the rows of this revision"):
        read("me/rows@v1")


def test_a_recipe_s_hub_set_has_a_commit(cached_set, checkpoints, tmp_path):
    recipe = write_file(tmp_path / "mine.toml", 'source = "me/rows"\nconfig = "german"\nrevision = "v1"\n')
    assert [row["answer"] for row in read(recipe)] == ["alt"]
    recipe.write_text('source = "me/rows"\nformat = "qa"\n')
    config, _ = parse(["--model_name", str(checkpoints()), "--dataset", f"{recipe}@v1"])
    config = prepare_sets(config, BYTES)[0]
    assert config.dataset == f"{recipe}@{FIRST}" and [row["answer"] for row in read(config.dataset)] == [
        "old"
    ]
    recipe.write_text('source = "rows"\nrevision = "v1"\n')
    with pytest.raises(UserError, match="config and revision are for a hub id"):
        read(recipe)


NOT_THERE = {  # what is not there: the words of the refusal
    "me/rows:french": "me/rows: .*has no configuration french, only default(, | and )german",
    "me/rows::test": "me/rows: has no split test, only train, validation",
    "me/rows:german:validation": "me/rows: has no split validation, only train",
    "me/rows@v2": "me/rows@v2: the hub cannot be reached, and its cache does not know this revision",
    f"me/rows@{'3' * 40}": "me/rows@3+: the hub cannot be reached, and the cache of `datasets` lacks",
    "me/other": "me/other: could not be loaded .*nor is there a file or folder",
    "me/rows:default:train[:1]": r"me/rows:default:train\[:1\]: train\[:1\] is not the name of one split",
}


@pytest.mark.parametrize("name", NOT_THERE)
def test_what_a_hub_set_lacks_is_told(name, cached_set):
    with pytest.raises(UserError, match=f"^--dataset {NOT_THERE[name]}"):
        read(name)


def test_the_hub_s_answers_are_those_of_the_commit(cached_set, monkeypatch):
    """With a connection, `datasets` lists configurations and splits; what it finds in its cache must fit."""
    original = {f: getattr(datasets, f) for f in ("load_dataset_builder", "get_dataset_config_names")}
    asked = []

    def answer(function):
        def call(source, *names, revision, **more):
            asked.append(revision)
            return original[function](str(cached_set), *names, **more)

        return call

    def no_remark(*_, **__):
        raise_connection_error()

    for function in original:
        monkeypatch.setattr(datasets, function, answer(function))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_revisions, "find_commit", lambda *_: (FIRST, True))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", no_remark)
    assert [row["answer"] for row in read("me/rows:german@v1")] == ["alt"]
    for name in ("me/rows:french", "me/rows::test"):
        with pytest.raises(UserError, match=f"^--dataset {NOT_THERE[name]}"):
            read(name)
    assert {*asked} == {FIRST}
    # A hub that does not find the set: `datasets` would read what it read last, which is another commit.
    find = original["load_dataset_builder"]
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config, **_: find(name, config))
    monkeypatch.setattr(hub_revisions, "find_commit", lambda *_: (SECOND, True))
    assert [row["answer"] for row in read("me/rows:default@main")] == ["1"]
    monkeypatch.setattr(hub_revisions, "find_commit", lambda *_: ("3" * 40, True))
    with pytest.raises(UserError, match="the cache of `datasets` lacks the rows of this revision"):
        read("me/rows:default@v3")


def test_without_a_connection_the_cache_knows_the_commit(cached_set, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", raise_connection_error)
    assert hub_revisions.find_commit("me/rows", "v1", False) == (FIRST, False)
    assert hub_revisions.find_commit("me/rows", "", False) == (SECOND, False)
    assert hub_revisions.find_commit("me/rows", "v2", False) == ("", False)
    assert [row["answer"] for row in read("me/rows@v1")] == ["old"]
    assert datasets.config.HF_HUB_OFFLINE  # no 20 seconds of retries
    shutil.rmtree(cached_set.parent / "cache" / "hub")
    found = load_rows(*find_recipe("me/rows:german"), -1)  # the last in the cache of `datasets`
    assert found.rows[0]["answer"] == "alt" and found.commit == FIRST


def test_a_revision_that_the_hub_does_not_have(monkeypatch):
    def refuse(*_, **__):
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(
        UserError, match=r"^--dataset me/rows@v9: on the hub me/rows has no branch, tag or commit v9"
    ):
        hub_revisions.find_commit("me/rows", "v9", False)
