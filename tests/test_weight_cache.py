"""The folder of --quantized_cache."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
import weight_cache
from config import UserError
from tests.runs import dense_state, make_job, set_up
from tests.test_packed_files import DENSE, QLORA, check, without_quantizing
from weight_cache import MANIFEST


@pytest.fixture
def cached(checkpoints, alpaca_file, two_ranks, tmp_path):
    """(arguments, the cache's folder, the weights of the run that made it)."""
    folder = tmp_path / "below" / "cache"
    args = ["--model_name", checkpoints("llama_bias"), "--dataset", alpaca_file, "--quantized_cache", folder]

    def make(*more):
        return [*args, *more], folder, two_ranks(dense_state, [*args, *more])[0]

    return make


@pytest.mark.parametrize("method", ["qlora", "bnb_dora", "hqq_lora --n_bits 3"])
def test_later_runs_load_what_the_first_packed(method, cached, one_rank, two_ranks):
    args, folder, first = cached("--train_type", *method.split())
    assert [p.name for p in folder.parent.iterdir()] == ["cache"]  # nothing partial is left
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in folder.iterdir())  # others may share it
    assert {p.name.split("-")[1] for p in folder.glob("packed-*")} == {"0", "1"}  # each rank wrote its own
    for ranks in (one_rank, two_ranks):
        later = ranks(without_quantizing, dense_state, args)[0]
        assert later.keys() == first.keys() and all(torch.equal(later[k], v) for k, v in first.items())


def test_a_cache_in_several_files(cached, one_rank):
    args, folder, first = cached("--train_type", "qlora")
    shutil.rmtree(folder)
    one_rank(with_small_files, args)
    assert len(list(folder.glob("packed-*"))) == 3
    later = one_rank(without_quantizing, dense_state, args)[0]
    assert all(torch.equal(later[k], v) for k, v in first.items())


def with_small_files(place, args):
    original, weight_cache.FILE_BYTES = weight_cache.FILE_BYTES, 20_000
    try:
        set_up(place, args)
    finally:
        weight_cache.FILE_BYTES = original


def test_two_runs_make_one_cache(checkpoints, alpaca_file, one_rank, tmp_path):
    """Both began before it was there: the slower one's is as good, and goes; what a run left a week ago as well."""
    args = [
        "--model_name",
        checkpoints(),
        "--dataset",
        alpaca_file,
        *QLORA,
        "--quantized_cache",
        tmp_path / "c",
    ]
    left = tmp_path / "c.abc.partial"
    left.mkdir()
    os.utime(left, (time.time() - 7 * 24 * 3600,) * 2)
    fresh = tmp_path / "c.def.partial"
    fresh.mkdir()
    one_rank(write_twice, args)
    assert {p.name for p in tmp_path.iterdir()} == {"c", fresh.name}
    assert one_rank(without_quantizing, dense_state, args)[0]


def write_twice(place, args):
    first, second = make_job(place, args), make_job(place, args)
    train.set_up(first, place)
    train.set_up(second, place)


def spoil_model(folder, args):
    """One row in the middle of one weight is another: a model trained a little further."""
    model = shutil.copytree(args[1], folder.parent / "other model")
    path = next(p for p in model.glob("*.safetensors") if DENSE in load_file(p))
    stored = load_file(path)
    stored[DENSE][len(stored[DENSE]) // 2] += 1e-3
    save_file(stored, path)
    args[1] = model


def name_too_long(folder, args):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["x" * 5000] = 1
    (folder / MANIFEST).write_text(json.dumps(manifest))


def spoil_manifest(folder, args):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20])


def edit_manifest(**values):
    def edit(folder, args):
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | values))

    return edit


DAMAGED = f"{MANIFEST} is damaged"
SPOILT = {
    "another model": (spoil_model, "packed weights of another model"),
    "other settings": (lambda folder, args: args.extend(["--n_bits", "2"]), r"packed by HQQ\(n_bits=4"),
    "half written": (lambda folder, args: (folder / MANIFEST).unlink(), f"no {MANIFEST}"),
    "manifest cut": (spoil_manifest, DAMAGED),
    "manifest too deep": (lambda folder, args: (folder / MANIFEST).write_text("[" * 10**5), DAMAGED),
    "no sizes": (edit_manifest(files=None), DAMAGED),
    "a name too long": (name_too_long, "missing or cut"),
    "other files": (edit_manifest(files={}), DAMAGED),
    "file missing": (lambda folder, args: next(folder.glob("packed-*")).unlink(), "missing or cut"),
    "file cut": (lambda folder, args: cut(next(folder.glob("packed-*"))), "missing or cut"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("case", SPOILT)
def test_a_cache_that_cannot_be_used(case, cached, alpaca_file):
    args, folder, _ = cached("--train_type", "hqq_lora")
    spoil, words = SPOILT[case]
    spoil(folder, args)
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.parent.rglob("*"))
    with pytest.raises(UserError, match=words):
        check(args[1], alpaca_file, *args[4:])
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.parent.rglob("*")) == before


def test_a_damaged_byte_ends_the_run_before_it_writes(cached, one_rank, tmp_path):
    args, folder, _ = cached("--train_type", "qlora")
    path = sorted(folder.glob("packed-*"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    message = one_rank(error_of_run, [*args, "--output_dir", tmp_path / "out"])[0]
    assert message.startswith("--quantized_cache: ") and "damaged" in message
    assert not (tmp_path / "out").exists()


def error_of_run(place, args) -> str:
    try:
        train.run_rank(place, make_job(place, args))
    except UserError as e:
        return str(e)
    return ""
