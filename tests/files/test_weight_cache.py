"""The folder of --quantized_cache: its files, a full disk, and folders that are refused."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from files import weight_cache
from files.names import ADAPTER
from files.weight_cache import MANIFEST, CachePlan, describe_packer, open_cache_writer
from options.errors import UserError
from quantization.hqq import HQQ
from quantization.nf4 import NF4
from tests.helpers.bnb_checkpoints import DENSE, QLORA, make_single_rank_job, without_quantizing
from tests.helpers.resuming import fill, run
from tests.helpers.runs import dense_state, make_job, set_up


@pytest.fixture(scope="module")
def packed(checkpoints, alpaca_file, two_ranks, tmp_path_factory):
    """pack(*options) -> (arguments, a cache that two ranks wrote, the weights of their run); made once."""
    made = {}
    args = ["--model_name", checkpoints("llama_bias"), "--dataset", alpaca_file]

    def pack(*more):
        if more not in made:
            folder = tmp_path_factory.mktemp("packed") / "cache"
            weights = two_ranks(dense_state, [*args, "--quantized_cache", folder, *more])[0]
            assert [p.name for p in folder.parent.iterdir()] == ["cache"]  # nothing partial is left
            made[more] = args, folder, weights
        return made[more]

    return pack


@pytest.fixture
def cached(packed, tmp_path):
    """make(*options) -> (arguments, a cache's folder, the weights of the run that wrote it)."""

    def make(*more):
        args, original, weights = packed(*more)
        folder = shutil.copytree(original, tmp_path / "below" / "cache")
        return [*args, "--quantized_cache", folder, *more], folder, weights

    return make


@pytest.mark.parametrize("method", ["qlora", "bnb_dora", "hqq_lora --n_bits 3"])
def test_later_runs_load_what_the_first_packed(method, cached, one_rank, two_ranks):
    args, folder, first = cached("--train_type", *method.split())
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in folder.iterdir())  # others may share it
    assert {p.name.split("-")[1] for p in folder.glob("packed-*")} == {"0", "1"}  # each rank wrote its own
    for ranks in (one_rank, two_ranks):
        later = ranks(without_quantizing, dense_state, args)[0]
        assert later.keys() == first.keys() and all(torch.equal(later[k], v) for k, v in first.items())


def test_a_cache_in_several_files(cached, one_rank):
    args, folder, first = cached("--train_type", "qlora")
    shutil.rmtree(folder)
    one_rank(load_with_small_files, args)
    assert len(list(folder.glob("packed-*"))) == 3
    later = one_rank(without_quantizing, dense_state, args)[0]
    assert all(torch.equal(later[k], v) for k, v in first.items())


def load_with_small_files(rank_info, args):
    """Load a model with cache files of about 20 kB."""
    original, weight_cache.FILE_BYTES = weight_cache.FILE_BYTES, 20_000
    try:
        set_up(rank_info, args)
    finally:
        weight_cache.FILE_BYTES = original


def test_two_runs_make_one_cache(checkpoints, alpaca_file, one_rank, tmp_path):
    """Both start before it exists: the slower one discards its own without a warning."""
    args = cache_args(checkpoints(), alpaca_file, tmp_path / "c")
    assert one_rank(write_cache_twice, args) == [""]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert one_rank(without_quantizing, dense_state, args)[0]


def cache_args(model, alpaca_file, folder) -> list:
    return ["--model_name", model, "--dataset", alpaca_file, *QLORA, "--quantized_cache", folder]


def write_cache_twice(rank_info, args) -> str:
    """Load twice with plans made before; return stderr."""
    first, second = make_job(rank_info, args), make_job(rank_info, args)
    with contextlib.redirect_stderr(io.StringIO()) as told:
        train.set_up(first, rank_info)
        train.set_up(second, rank_info)
    return told.getvalue()


def test_staging_folders_of_interrupted_runs(one_rank, tmp_path):
    """One from a week ago is removed at once. A fresh one may be in use, until there is a cache."""
    for name, days in ("old", 7), ("fresh", 0):
        (tmp_path / f"c.{name}.partial").mkdir()
        os.utime(tmp_path / f"c.{name}.partial", (time.time() - days * 24 * 3600,) * 2)
    during = one_rank(list_while_writing, tmp_path / "c")[0]
    assert "c.fresh.partial" in during and "c.old.partial" not in during and len(during) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def list_while_writing(rank_info, folder, error=None) -> list[str]:
    """Write an empty cache, or raise `error`; return the names in its parent folder while writing."""
    with open_cache_writer(CachePlan(folder, {}, 0), rank_info):
        if error:
            raise error
        return [p.name for p in folder.parent.iterdir()]


def test_a_load_that_fails_leaves_nothing(one_rank, tmp_path):
    assert one_rank(fail_while_writing, tmp_path / "c") == [[]]


def fail_while_writing(rank_info, folder) -> list[str]:
    with pytest.raises(torch.OutOfMemoryError):
        list_while_writing(rank_info, folder, torch.OutOfMemoryError())
    return [p.name for p in folder.parent.iterdir()]


def test_a_link_to_the_folder_of_the_cache(checkpoints, alpaca_file, one_rank, tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "c").symlink_to("large disk")
    one_rank(load, cache_args(checkpoints(), alpaca_file, tmp_path / "c"))
    assert (tmp_path / "c").is_symlink() and (tmp_path / "large disk" / MANIFEST).is_file()
    (tmp_path / "d").symlink_to("/proc/none/cache")
    with pytest.raises(UserError, match=r"^--quantized_cache /proc/none: cannot be written"):
        make_single_rank_job(checkpoints(), alpaca_file, *QLORA, "--quantized_cache", tmp_path / "d")


def test_a_mount_point_is_refused(checkpoints, alpaca_file, small_disk):
    """The staging folder would be on another disk, so it could not be renamed."""
    with pytest.raises(
        UserError, match=r"^--quantized_cache .*/disk: is a mount point; choose a folder in it"
    ):
        make_single_rank_job(checkpoints(), alpaca_file, *QLORA, "--quantized_cache", small_disk)


@pytest.mark.parametrize(
    ("cache", "output", "what"),
    [
        (".", "out", "the current folder"),
        ("../link", "out", "the current folder"),
        ("out", "out", "--output_dir out"),
        ("../a", "../a/b/out", "--output_dir ../a/b/out"),
    ],
)
def test_a_cache_in_the_place_of_a_folder_of_the_run(
    cache, output, what, checkpoints, alpaca_file, tmp_path, monkeypatch
):
    """It is refused even if empty or missing: the cache would replace it during the run."""
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    options = [*QLORA, "--quantized_cache", cache, "--output_dir", output]
    with pytest.raises(UserError, match=f"^--quantized_cache {tmp_path}/.*: is {what}, or above it"):
        make_single_rank_job(checkpoints(), alpaca_file, *options)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["here", "link"]


def load(rank_info, args) -> None:
    set_up(rank_info, args)


@pytest.mark.parametrize("checked", [True, False])
def test_a_full_disk_costs_the_cache_only(checked, checkpoints, alpaca_file, two_ranks, small_disk, tmp_path):
    """The lack of space is known at the start or, if others fill the disk later, at the first write."""
    fill(small_disk, leave=16 * 1024)
    args = cache_args(checkpoints(), alpaca_file, small_disk / "cache")
    args += ["--output_dir", tmp_path / "out", "--max_steps", "2", "--log_to", "stdout"]
    printed = two_ranks(run_on_full_disk, list(map(str, args)), checked)
    (warning,) = (line for text in printed for line in text.splitlines() if "--quantized_cache" in line)
    assert warning.startswith(f"WARNING: --quantized_cache {small_disk / 'cache'}: could not be")
    assert "No space left" in warning and ("MiB are needed" in warning) == checked
    assert [p.name for p in small_disk.iterdir()] == ["others"]
    assert (tmp_path / "out" / ADAPTER).is_file()


def run_on_full_disk(rank_info, args, checked) -> str:
    """Run the program, with or without a check of free space; return its output."""
    original = weight_cache.check_free_space
    if not checked:
        weight_cache.check_free_space = lambda *_: None
    try:
        return run(rank_info, args)
    finally:
        weight_cache.check_free_space = original


def test_a_rank_that_cannot_write_ends_the_cache_on_all(
    checkpoints, alpaca_file, one_rank, two_ranks, tmp_path
):
    """The files of both ranks are removed at once, and neither writes more; both load the whole model."""
    args = cache_args(checkpoints(), alpaca_file, tmp_path / "below" / "c")
    plain = one_rank(dense_state, args[:-2])[0]
    (state, told, files), (other, silent, more) = two_ranks(load_where_one_cannot_write, args)
    assert all(torch.equal(state[k], v) and torch.equal(other[k], v) for k, v in plain.items())
    assert told.count("\n") == 1 and "No space left on device" in told and not silent
    assert more == 2 and files < 6  # the second of rank 1's failed; rank 0 has at least six to write
    assert not list((tmp_path / "below").iterdir())


def load_where_one_cannot_write(rank_info, args) -> tuple[dict, str, int]:
    """Load while writes of rank 1 fail from its second file on.

    Returns (the weights, stderr, number of files begun).
    """
    size, save, begun = weight_cache.FILE_BYTES, weight_cache.save_tensors, []

    def save_or_fail(tensors, path):
        begun.append(path)
        if rank_info.rank and len(begun) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    weight_cache.FILE_BYTES, weight_cache.save_tensors = 0, save_or_fail
    try:
        with contextlib.redirect_stderr(io.StringIO()) as told:
            return dense_state(rank_info, args), told.getvalue(), len(begun)
    finally:
        weight_cache.FILE_BYTES, weight_cache.save_tensors = size, save


# Caches that cannot be used


@pytest.mark.parametrize("quantizer", [NF4(), HQQ(4)])
def test_a_gpus_codes_are_not_a_cpus(quantizer):
    """HQQ computes in fp16 on a GPU; ties of NF4's scales are rounded differently."""
    assert describe_packer(quantizer, "cuda") != describe_packer(quantizer, "cpu")


def change_model(folder, args, row=32):
    """Change one row of one weight, as in a model that was trained a little further."""
    model = shutil.copytree(args[1], folder.parent / "other model")
    path = next(p for p in model.glob("*.safetensors") if DENSE in load_file(p))
    stored = load_file(path)
    stored[DENSE][row] += 1e-3
    save_file(stored, path)
    args[1] = model


def name_long_file(folder, args):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][f"packed-0-{'0' * 5000}.safetensors"] = 1
    (folder / MANIFEST).write_text(json.dumps(manifest))


def move_file(name):
    """Return a function that moves a file to `name` and edits the manifest, sizes included."""

    def edit(folder, args):
        manifest = json.loads((folder / MANIFEST).read_text())
        file = next(iter(manifest["files"]))
        path = folder / name
        (folder / file).rename(path)
        manifest["files"][str(name)] = manifest["files"].pop(file)
        for tensor in manifest["tensors"].values():
            tensor["file"] = str(name) if tensor["file"] == file else tensor["file"]
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return edit


def downgrade_manifest(folder, args):
    manifest = json.loads((folder / MANIFEST).read_text()) | {"version": 1}
    del manifest["device"], manifest["library"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def truncate_manifest(folder, args):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20])


def edit_cache_manifest(**values):
    """Return a function that sets values in the manifest."""

    def edit(folder, args):
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | values))

    return edit


DAMAGED = f"{MANIFEST} is damaged"
OTHER, OURS = ("a CPU", "a GPU") if torch.cuda.is_available() else ("a GPU", "a CPU")
UNUSABLE = {
    "another model": (change_model, "packed weights of another model"),
    "another row": (
        lambda folder, args: change_model(folder, args, row=5),
        "packed weights of another model",
    ),
    "another device": (
        edit_cache_manifest(device=OTHER),
        f"packed by {OTHER}, not {OURS}; choose another folder",
    ),
    "another hqq": (
        edit_cache_manifest(library="hqq 0.0.1"),
        r"packed by hqq 0\.0\.1, not hqq [\w.]+; choose another",
    ),
    "another version": (downgrade_manifest, "made by another version; delete the folder"),
    "other settings": (lambda folder, args: args.extend(["--n_bits", "2"]), r"packed by HQQ\(n_bits=4"),
    "half written": (lambda folder, args: (folder / MANIFEST).unlink(), f"no {MANIFEST}"),
    "manifest cut": (truncate_manifest, DAMAGED),
    "manifest too deep": (lambda folder, args: (folder / MANIFEST).write_text("[" * 10**5), DAMAGED),
    "no sizes": (edit_cache_manifest(files=None), DAMAGED),
    "no device": (edit_cache_manifest(device=None), DAMAGED),
    "a name too long": (name_long_file, DAMAGED),
    "a file above": (move_file("../x"), DAMAGED),
    "another file": (move_file("x"), DAMAGED),
    "other files": (edit_cache_manifest(files={}), DAMAGED),
    "file missing": (lambda folder, args: next(folder.glob("packed-*")).unlink(), "missing or truncated"),
    "file cut": (lambda folder, args: truncate(next(folder.glob("packed-*"))), "missing or truncated"),
}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_cache_that_cannot_be_used(case, cached, alpaca_file):
    args, folder, _ = cached("--train_type", "hqq_lora")
    spoil, words = UNUSABLE[case]
    spoil(folder, args)
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.parent.rglob("*"))
    with pytest.raises(UserError, match=words):
        make_single_rank_job(args[1], alpaca_file, *args[4:])
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.parent.rglob("*")) == before


def test_a_damaged_byte_ends_the_run_before_it_writes(cached, one_rank, tmp_path):
    args, folder, _ = cached("--train_type", "qlora")
    path = sorted(folder.glob("packed-*"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    message = one_rank(run_and_catch, [*args, "--output_dir", tmp_path / "out"])[0]
    assert message.startswith("--quantized_cache: ") and "damaged" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.view(torch.bfloat16),
        lambda t: torch.cat([t, t]),
        lambda t: t.view(2, -1),
        lambda t: t.to(torch.int64),
    ],
)
@pytest.mark.parametrize("part", ["codes", "scales"])
def test_codes_of_another_dtype_or_size(part, spoil, cached, one_rank):
    args, folder, _ = cached("--train_type", "hqq_lora")
    path = sorted(folder.glob("packed-*"))[0]
    stored = load_file(path)
    name = next(n for n in sorted(stored) if n.endswith(part))
    stored[name] = spoil(stored[name]).contiguous()
    save_file(stored, path)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][path.name] = path.stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest))
    message = one_rank(run_and_catch, args)[0]
    weight = name.removesuffix(f".{part}")
    assert (
        message
        == f"--quantized_cache: {path} is damaged ({weight}: another dtype or size); delete the folder"
    )


def run_and_catch(rank_info, args) -> str:
    """Run a rank; return the message of its UserError, or ""."""
    try:
        train.run_rank(rank_info, make_job(rank_info, args))
    except UserError as e:
        return str(e)
    return ""
