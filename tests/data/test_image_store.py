"""data/image_store.py: the bytes of images in rows go to one file of the cache."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from data.image_store import ImageStore, StoredImage, image_cache
from data.row_files import read_file
from options.errors import UserError
from tests.helpers.data_files import to_jsonl, write_file, write_parquet
from tests.helpers.images import encode_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "fsdp-finetune" / "images"


def content(stored: StoredImage) -> bytes:
    return stored.store.path.read_bytes()[stored.start : stored.start + stored.size]


FIRST, SECOND = encode_image(color=1), encode_image(color=2)


def test_each_image_is_written_once(cache):
    """Equal images share their bytes, and a second reading of the file leaves the cache as it is."""
    with ImageStore("rows") as store:
        stored = [store.add(FIRST), store.add(SECOND), store.add(FIRST)]
    assert [content(one) for one in stored] == [FIRST, SECOND, FIRST]
    (file,) = cache.iterdir()
    assert file.stat().st_size == len(FIRST + SECOND) and file == stored[0].store.path
    written = file.stat().st_mtime_ns, file.stat().st_ino
    with ImageStore("the same rows in another file") as store:
        again = [store.add(FIRST), store.add(SECOND)]
    assert [content(one) for one in again] == [FIRST, SECOND]
    assert [*cache.iterdir()] == [file] and (file.stat().st_mtime_ns, file.stat().st_ino) == written


def test_a_damaged_file_of_the_cache_is_written_again(cache, monkeypatch):
    """Its name and its size are right. The new one is on the disk before it gets the name."""
    calls, sync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("sync") or sync(file))
    monkeypatch.setattr(Path, "replace", lambda *paths: calls.append("name") or replace(*paths))
    for _ in range(3):
        with ImageStore("rows") as store:
            stored = [store.add(FIRST), store.add(SECOND)]
        assert [content(one) for one in stored] == [FIRST, SECOND]
        data = bytearray(stored[0].store.path.read_bytes())
        data[len(FIRST) + 20] ^= 1
        stored[0].store.path.write_bytes(data)
    assert calls == ["sync", "name"] * 3 and len([*cache.iterdir()]) == 1


def test_nothing_is_left_after_an_error(cache, tmp_path):
    """Rows without images write nothing; a file that turns out to be malformed leaves nothing."""
    read_file(write_file(tmp_path / "texts.jsonl", to_jsonl([{"text": "data:image/png;base64,AAAA"}])))
    assert not cache.exists()
    rows = to_jsonl([{"image": f"data:image/png;base64,{base64.b64encode(FIRST).decode()}"}])
    with pytest.raises(UserError, match=r"broken.jsonl:2: not JSON"):
        read_file(write_file(tmp_path / "broken.jsonl", rows + "{"))
    assert [*cache.iterdir()] == []


def test_the_forms_in_which_rows_hold_images(tmp_path):
    """Base64 in JSON and its parts; Hugging Face's struct in parquet; bytes in a column of something else."""
    part = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(FIRST).decode()},
    }
    encoded = {"bytes": base64.b64encode(SECOND).decode(), "path": "b/c.png"}
    rows = [{"messages": [{"role": "user", "content": [part]}], "image": encoded, "scan": None, "text": "hi"}]
    (row,) = read_file(write_file(tmp_path / "rows.jsonl", to_jsonl(rows)), ("images", "image")).rows
    assert content(row["messages"][0]["content"][0]["image_url"]["url"]) == FIRST
    assert content(row["image"]) == SECOND and row["image"].name == "c.png" and row["text"] == "hi"

    struct = {"bytes": FIRST, "path": None}
    rows = [{"images": [struct, {"bytes": SECOND, "path": "x.png"}], "scan": struct, "raw": SECOND}]
    (row,) = read_file(write_parquet(tmp_path / "rows.parquet", rows), ("images", "raw")).rows
    assert [content(one) for one in row["images"]] == [FIRST, SECOND] and content(row["raw"]) == SECOND
    assert row["scan"] == {"bytes": len(FIRST)}  # of a column that holds no images


def test_deep_rows_are_read(tmp_path):
    """As deep as JSON may be; no image is so deep."""
    path = write_file(tmp_path / "rows.jsonl", '{"text": "hi", "more": ' + "[" * 900 + "]" * 900 + "}\n")
    (row,) = read_file(path).rows
    assert row["text"] == "hi" and isinstance(row["more"], list)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(write_file(tmp_path / "file", "")))
    message = r"^--dataset rows: the cache .*images cannot hold .*HF_HOME names"
    with pytest.raises(UserError, match=message), ImageStore("rows") as store:
        store.add(FIRST)


def test_the_cache_is_beside_that_of_the_hub(monkeypatch):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert image_cache() == Path("/var/cache/me/huggingface/fsdp-finetune/images")
