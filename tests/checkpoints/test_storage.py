"""A checkpoint is whole or none at all, whatever was cut, changed or full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from checkpoints import storage as checkpoint_files
from checkpoints.background import Background
from checkpoints.planner import CopyPlanner
from checkpoints.storage import (
    MANIFEST,
    Damaged,
    Reader,
    Writer,
    folder_of,
    newest_whole,
    prune,
    read_checkpoint,
    remove_checkpoints,
    steps_in,
)
from options.errors import UserError
from tests.helpers.manifests import edit_manifest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TENSORS = {
    "a.weight": torch.randn(40, 30),
    "half": torch.randn(7).bfloat16(),
    "codes": torch.arange(256, dtype=torch.uint8),
    "number": torch.tensor(3.0),
    "empty": torch.empty(0, 5),
}


def write(run: Path, step: int, tensors=TENSORS, **what) -> Path:
    folder = folder_of(run, step)
    planner = CopyPlanner(Background(rests=False))
    planner.hold(tensors, tensors)
    writer = Writer(folder, step, lambda: what)
    metadata = dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    assert not metadata.planner_data and not metadata.state_dict_metadata, "which goes to all ranks"
    return folder


def test_what_is_written_is_read(tmp_path):
    saved = read_checkpoint(write(tmp_path, 12, loss=1.5))
    assert (saved.step, saved.run) == (12, {"loss": 1.5})
    read = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(read, storage_reader=Reader(saved), planner=planner, no_dist=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert {p.name for p in saved.folder.iterdir()} == {MANIFEST, "rank-00000.safetensors"}


def flip(path: Path, position: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


FILE = "rank-00000.safetensors"
DAMAGE = {
    "a bit of a file": (lambda f: flip(f / FILE), "not as it was written"),
    "the end of a file": (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-1]), "not as it was"),
    "a file": (lambda f: (f / FILE).unlink(), "No such file"),
    "the manifest": (lambda f: (f / MANIFEST).unlink(), "No such file"),
    "the manifest's end": (
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:-9]),
        "is damaged",
    ),
    "the manifest's text": (lambda f: (f / MANIFEST).write_text("[1, 2]"), "is damaged"),
    "a number in it": (
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text().replace('"step": 9', '"step": 8')),
        "was changed",
    ),
    "its step": (lambda f: edit_manifest(f, lambda m: m.update(step=8)), "is of step 8"),
    "a file's name": (
        lambda f: edit_manifest(f, lambda m: m["files"][0].update(name="../../x")),
        "other files",
    ),
    "a dtype": (
        lambda f: edit_manifest(f, lambda m: m["tensors"]["half"].update(dtype="nn")),
        "unknown dtype",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_none_and_the_one_before_is_found(kind, tmp_path):
    damage, reason = DAMAGE[kind]
    write(tmp_path, 7)
    last = write(tmp_path, 9)
    assert newest_whole(tmp_path, pytest.fail).step == 9
    damage(last)
    with pytest.raises(Damaged, match=reason):
        read_checkpoint(last)
    told = []
    assert newest_whole(tmp_path, told.append).step == 7
    assert len(told) == 1 and "step-00000009" in told[0]


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def become_large(path: Path) -> None:
    path.write_text("")
    os.truncate(path, 2**40)


UNKNOWN = {
    "another version": (
        lambda f: edit_manifest(f, lambda m: m.update(version=99)),
        "made by another version",
    ),
    "a read error": (lambda f: become_a_loop(f / FILE), f"{FILE}: Too many levels"),
    "no file": (lambda f: become_a_folder(f / MANIFEST), f"{MANIFEST}: is not a file"),
    "a large manifest": (lambda f: become_large(f / MANIFEST), "bytes; at most"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_may_be_whole_is_not_passed_over(kind, tmp_path):
    """The run would go on from the one before, and remove it."""
    damage, reason = UNKNOWN[kind]
    write(tmp_path, 7)
    damage(write(tmp_path, 9))
    with pytest.raises(UserError, match=reason):
        newest_whole(tmp_path, pytest.fail)


def test_a_write_that_was_cut_leaves_no_checkpoint(tmp_path, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    write(tmp_path, 1)
    monkeypatch.setattr(Writer, "finish", cut)
    with pytest.raises(BaseException):  # noqa: B017
        write(tmp_path, 2)
    assert steps_in(tmp_path) == [1] and newest_whole(tmp_path, pytest.fail).step == 1
    assert folder_of(tmp_path, 2).with_suffix(".tmp").is_dir()
    remove_checkpoints(tmp_path, after=5)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_old_and_later_checkpoints_are_removed(tmp_path):
    for step in (5, 10, 15, 100_000_000):
        write(tmp_path, step)
    prune(tmp_path, keep=3)
    assert steps_in(tmp_path) == [100_000_000, 15, 10]
    remove_checkpoints(tmp_path, after=10)
    assert steps_in(tmp_path) == [10]


def test_a_full_disk_is_seen_before_anything_is_written(small_disk):
    write(small_disk, 1)
    (small_disk / "others").write_bytes(bytes(2**20))
    with pytest.raises(dcp.CheckpointException, match=r"No space left.* are needed") as caught:
        write(
            small_disk, 2, {"large": torch.zeros(2**18)}
        )  # 1 MiB, where more is free, but not with what is spared
    assert caught.value.failures[0][0].errno == errno.ENOSPC
    assert not folder_of(small_disk, 2).with_suffix(".tmp").exists()
    assert newest_whole(small_disk, pytest.fail).step == 1


def test_a_disk_that_others_fill_meanwhile_leaves_no_checkpoint(small_disk, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "SPARE", -(2**30))
    write(small_disk, 1)
    with pytest.raises(dcp.CheckpointException) as caught:
        write(small_disk, 2, {"large": torch.zeros(2**20)})
    assert isinstance(caught.value.failures[0][0], OSError)
    assert newest_whole(small_disk, pytest.fail).step == 1
