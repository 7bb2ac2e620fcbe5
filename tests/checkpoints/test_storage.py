"""A checkpoint is complete or ignored after an interruption, damage or a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from checkpoints import storage as checkpoint_files
from checkpoints.background import BackgroundThrottle
from checkpoints.planner import CheckpointPlanner
from checkpoints.storage import (
    MANIFEST,
    CheckpointReader,
    CheckpointWriter,
    DamagedCheckpoint,
    checkpoint_folder,
    checkpoint_steps,
    find_newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    remove_checkpoints,
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


def write(run: Path, step: int, tensors=TENSORS, **run_state) -> Path:
    """Write a checkpoint from one rank. Return its folder."""
    folder = checkpoint_folder(run, step)
    planner = CheckpointPlanner(BackgroundThrottle(enabled=False))
    planner.set_tensors(tensors, tensors)
    writer = CheckpointWriter(folder, step, lambda: run_state)
    metadata = dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    assert not metadata.planner_data and not metadata.state_dict_metadata, "torch sends it to all ranks"
    return folder


def test_what_is_written_is_read(tmp_path):
    checkpoint = read_checkpoint(write(tmp_path, 12, loss=1.5))
    assert (checkpoint.step, checkpoint.run) == (12, {"loss": 1.5})
    read = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(read, storage_reader=CheckpointReader(checkpoint), planner=planner, no_dist=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert {p.name for p in checkpoint.folder.iterdir()} == {MANIFEST, "rank-00000.safetensors"}


def flip(path: Path, position: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


FILE = "rank-00000.safetensors"
DAMAGE = {
    "a bit of a file": (lambda f: flip(f / FILE), "does not match its size or checksum"),
    "the end of a file": (
        lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-1]),
        "does not match its size",
    ),
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
def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(kind, tmp_path):
    damage, reason = DAMAGE[kind]
    write(tmp_path, 7)
    last = write(tmp_path, 9)
    assert find_newest_checkpoint(tmp_path, pytest.fail).step == 9
    damage(last)
    with pytest.raises(DamagedCheckpoint, match=reason):
        read_checkpoint(last)
    warnings = []
    assert find_newest_checkpoint(tmp_path, warnings.append).step == 7
    assert len(warnings) == 1 and "step-00000009" in warnings[0]


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def replace_by_large_file(path: Path) -> None:
    path.write_text("")
    os.truncate(path, 2**40)


UNKNOWN = {
    "another version": (
        lambda f: edit_manifest(f, lambda m: m.update(version=99)),
        "made by another version",
    ),
    "a read error": (lambda f: replace_by_link_loop(f / FILE), f"{FILE}: Too many levels"),
    "no file": (lambda f: replace_by_folder(f / MANIFEST), f"{MANIFEST}: is not a file"),
    "a large manifest": (lambda f: replace_by_large_file(f / MANIFEST), "bytes; at most"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_checkpoint_that_may_be_complete_is_not_skipped(kind, tmp_path):
    """Otherwise the run would resume from the previous checkpoint, and remove this one."""
    damage, reason = UNKNOWN[kind]
    write(tmp_path, 7)
    damage(write(tmp_path, 9))
    with pytest.raises(UserError, match=reason):
        find_newest_checkpoint(tmp_path, pytest.fail)


def test_an_interrupted_write_leaves_no_checkpoint(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    write(tmp_path, 1)
    monkeypatch.setattr(CheckpointWriter, "finish", interrupt)
    with pytest.raises(BaseException):  # noqa: B017
        write(tmp_path, 2)
    assert checkpoint_steps(tmp_path) == [1] and find_newest_checkpoint(tmp_path, pytest.fail).step == 1
    assert checkpoint_folder(tmp_path, 2).with_suffix(".tmp").is_dir()
    remove_checkpoints(tmp_path, after=5)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_old_and_later_checkpoints_are_removed(tmp_path):
    for step in (5, 10, 15, 100_000_000):
        write(tmp_path, step)
    prune_checkpoints(tmp_path, keep=3)
    assert checkpoint_steps(tmp_path) == [100_000_000, 15, 10]
    remove_checkpoints(tmp_path, after=10)
    assert checkpoint_steps(tmp_path) == [10]


def test_a_full_disk_is_seen_before_anything_is_written(small_disk):
    write(small_disk, 1)
    (small_disk / "others").write_bytes(bytes(2**20))
    with pytest.raises(dcp.CheckpointException, match=r"No space left.* are needed") as caught:
        # 1 MiB: more is free, but not with SPARE_BYTES.
        write(small_disk, 2, {"large": torch.zeros(2**18)})
    assert caught.value.failures[0][0].errno == errno.ENOSPC
    assert not checkpoint_folder(small_disk, 2).with_suffix(".tmp").exists()
    assert find_newest_checkpoint(small_disk, pytest.fail).step == 1


def test_a_disk_that_others_fill_meanwhile_leaves_no_checkpoint(small_disk, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "SPARE_BYTES", -(2**30))
    write(small_disk, 1)
    with pytest.raises(dcp.CheckpointException) as caught:
        write(small_disk, 2, {"large": torch.zeros(2**20)})
    assert isinstance(caught.value.failures[0][0], OSError)
    assert find_newest_checkpoint(small_disk, pytest.fail).step == 1
