"""data/dataset_names.py: values of --dataset, taken apart and put together again."""

from __future__ import annotations

import os
import re
from fractions import Fraction

import pytest

from data.dataset_names import (
    RECIPE_FOLDER,
    DatasetName,
    make_name_absolute,
    pin_commit,
    split_mixture,
    split_name,
)
from options.errors import UserError

NAMES = {  # a name, its parts
    "alpaca": DatasetName("alpaca"),
    "owner/name": DatasetName("owner/name"),
    "owner/name:config": DatasetName("owner/name", "config"),
    "owner/name:config:split": DatasetName("owner/name", "config", "split"),
    "owner/name::split": DatasetName("owner/name", "", "split"),
    "owner/name@v1.0": DatasetName("owner/name", revision="v1.0"),
    "owner/name@refs/convert/parquet": DatasetName("owner/name", revision="refs/convert/parquet"),
    "owner/name:20220301.en:test@" + "a" * 40: DatasetName("owner/name", "20220301.en", "test", "a" * 40),
    "alpaca@main": DatasetName("alpaca", revision="main"),
    "https://a.invalid/b@c": DatasetName("https://a.invalid/b@c"),
    "data/@*.jsonl": DatasetName("data/@*.jsonl"),
}


@pytest.mark.parametrize("text", NAMES)
def test_the_parts_of_a_name(text):
    assert split_name(text) == NAMES[text] and str(NAMES[text]) == text


def test_a_commit_replaces_the_revision():
    assert pin_commit("owner/name:config@main", "abc") == "owner/name:config@abc"
    assert pin_commit("owner/name::test", "abc") == "owner/name::test@abc"
    assert pin_commit("rows.jsonl", "") == "rows.jsonl"


MIXTURES = {  # a mixture, its sets and weights
    "a": [("a", None)],
    "a,b": [("a", None), ("b", None)],
    "a*0.7,b*0.3": [("a", Fraction(7, 10)), ("b", Fraction(3, 10))],
    "a*7,o/b:c:d@e*3,f.jsonl*1e-3": [("a", 7), ("o/b:c:d@e", 3), ("f.jsonl", Fraction(1, 1000))],
    "data/train-*": [("data/train-*", None)],
    "data/*.jsonl*.5,b*0.5": [("data/*.jsonl", Fraction(1, 2)), ("b", Fraction(1, 2))],
}


@pytest.mark.parametrize("text", MIXTURES)
def test_the_sets_of_a_mixture(text):
    shares = split_mixture(text)
    assert [(share.name, share.weight) for share in shares] == MIXTURES[text]
    assert ",".join(map(str, shares)) == text


def test_spaces_around_names_and_weights_do_not_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_mixture(" a * .7 , b*.3 ") == split_mixture("a*.7,b*.3")
    assert split_mixture("a, b") == split_mixture("a,b") and split_mixture(" a ") == split_mixture("a")
    (tmp_path / " b,c ").write_text("")  # a file of this name
    assert [share.name for share in split_mixture("a, b,c ,d")] == ["a", " b,c ", "d"]


@pytest.mark.parametrize("text", [
    "a.jsonl,./a.jsonl", "a.jsonl*1,link.jsonl*2", "d,d/", "d,d::train", "*.jsonl,./*.jsonl", "o/n,o/n@main",
    f"alpaca,{RECIPE_FOLDER}/alpaca.toml", "~/a.jsonl,a.jsonl",
])  # fmt: skip
def test_two_spellings_of_one_set(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d").mkdir()
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    with pytest.raises(UserError, match=r" is named twice \(as .*\); a larger weight"):
        split_mixture(text)
    for other in ("d::train,d::test", "o/n,o/n:c", "o/n,o/n@v1", "*.jsonl,a.*"):
        assert len(split_mixture(other)) == 2


@pytest.mark.parametrize("text, words", [
    ("a*0,b*1", "the weight 0 of a is not a positive number"),
    ("a*-1,b*2", "the weight -1 of a is not"),
    ("a*nan,b*1", "the weight nan of a is not"),
    ("a*inf,b*1", "the weight inf of a is not"),
    ("a*1e99,b*1", "the weight 1e99 of a is not"),
    ("a*0,b*0", "the weight 0 of a is not"),
    ("a*0.5,b", "b has no weight; give all sets one, as in a*0.7,b*0.3, or none"),
    ("a*0.5", "a weight has no effect on a set alone"),
    ("a*0.5,", "a set's name is missing beside a comma"),
    (",", "a set's name is missing"),
    ("a*1,b*1,a*2", "a is named twice; a larger weight repeats its rows"),
    ("a," * 60, "names 61 sets; at most 50"),
])  # fmt: skip
def test_mixtures_that_mean_nothing(text, words):
    with pytest.raises(UserError, match=f"^--dataset .*: .*{re.escape(words)}"):
        split_mixture(text)


def test_what_exists_is_a_name_as_it_stands(tmp_path, monkeypatch):
    """Its commas, stars, colons and at signs belong to it, within a mixture and in absolute paths too."""
    folder = tmp_path / "x,y*2" / "a:b@c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    odd = ("a*0.5,b*0.5", "a,b.jsonl", "c*2", "d:e:f@g")
    for name in (*odd, "one", "two"):
        (folder / name).write_text("")
    for name in odd:
        assert [share.name for share in split_mixture(name)] == [name] == [split_name(name).base]
    for text, names in (
        ("a,b.jsonl,one", ["a,b.jsonl", "one"]),
        ("a,b.jsonl*0.7,c*2*0.3", ["a,b.jsonl", "c*2"]),
        ("a*0.5,b*0.5*1,two*1", ["a*0.5,b*0.5", "two"]),
        ("*.jsonl,d:e:f@g", ["*.jsonl", "d:e:f@g"]),
    ):
        shares = split_mixture(text)
        assert [share.name for share in shares] == names
        absolute = split_mixture(make_name_absolute(text))  # the folders above have odd names as well
        assert [os.path.relpath(share.name) for share in absolute] == names
        assert [share.weight for share in absolute] == [share.weight for share in shares]
    assert make_name_absolute("alpaca*1,owner/name:c*2,one*3") == f"alpaca*1,owner/name:c*2,{folder}/one*3"
