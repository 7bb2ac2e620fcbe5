"""What a checkpoint leaves on the disk, in which order, and what a run is told of it."""

from __future__ import annotations

import contextlib
import io
import os
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import manager as checkpoints
from checkpoints import planner as checkpoint_plan
from checkpoints.storage import folder_of, read_checkpoint
from files import tensors as tensor_files
from files.tensors import writev_tensors
from tests.helpers.saving import TENSORS, SmallRun


@pytest.mark.parametrize("taken", [3, 100, 5000])
def test_what_the_disk_takes_in_parts_is_whole(taken, tmp_path, monkeypatch):
    """Two tensors in a call, of which it takes some bytes: those before others' end, just these, or more."""
    monkeypatch.setattr(tensor_files, "MAX_BUFFERS_PER_WRITE", 2)
    calls, wrote = [], []

    def some(descriptor: int, buffers: list) -> int:
        calls.append(len(buffers))
        wrote.append(os.write(descriptor, b"".join(buffers)[:taken]))
        return wrote[-1]

    monkeypatch.setattr(os, "writev", some)
    writev_tensors(TENSORS, tmp_path / "copies")
    assert max(calls) == 2
    assert sum(wrote) == (tmp_path / "copies").stat().st_size, "the header as well"
    written = load_file(tmp_path / "copies")
    assert written.keys() == TENSORS.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in TENSORS.items())


def test_each_tensor_lies_where_its_dtype_can_be_read(tmp_path):
    odd = {
        "codes": torch.arange(3, dtype=torch.uint8),
        "half": torch.ones(3).half(),
        "number": torch.ones(1),
        "count": torch.ones(1, dtype=torch.int64),
    }
    writev_tensors(odd, tmp_path / "odd")
    for name, stored in tensor_files.list_tensors(tmp_path / "odd").items():
        assert stored.begin % odd[name].element_size() == 0, name


def counting_by_numbers(place, folder: str) -> None:
    run = SmallRun(place, folder, every=1)
    run.checkpoints.describe_run = lambda: {"counts": {10: "a", 9: "b"}}
    run.step()
    run.checkpoints.finish()
    saved = read_checkpoint(folder_of(Path(folder), 1))  # whole, by its manifest's digest
    assert saved.run["counts"] == {"10": "a", "9": "b"}


def test_numbers_that_a_run_counts_by_may_be_keys(one_rank, tmp_path):
    """As JSON knows texts only, and sorts those otherwise."""
    one_rank(counting_by_numbers, str(tmp_path))


def order_of_a_save(place, folder: str) -> list[str]:
    """What is synced, and what gets its name, by its path within the RUN."""
    run, seen, sync, rename = SmallRun(place, folder, every=1), [], os.fsync, os.rename

    def note(word: str, path) -> None:
        seen.append(f"{word} {os.path.relpath(path, folder)}")

    def syncs(descriptor: int) -> None:
        note("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def renames(old, new) -> None:
        note("rename", old)
        rename(old, new)

    (Path(folder) / "metrics.jsonl").write_text("a line\n")
    with mock.patch.object(os, "fsync", syncs), mock.patch.object(os, "rename", renames):
        run.step()
        run.check_saved()
        run.checkpoints.finish()
    return seen


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(one_rank, tmp_path):
    """With the lines that it counts on; afterwards the name is, and that of the folder that holds it."""
    new = "checkpoints/step-00000001.tmp"
    files = [f"{new}/rank-00000.safetensors", "metrics.jsonl", f"{new}/manifest.json", new]
    expected = [*(f"sync {name}" for name in files), f"rename {new}", "sync checkpoints", "sync ."]
    assert one_rank(order_of_a_save, str(tmp_path)) == [expected]


def cannot_plan_at_the_end(place, folder: str) -> str:
    """What a run shows whose only checkpoint is that of its end, and cannot be planned."""
    run, shown = SmallRun(place, folder, every=2), io.StringIO()
    fails = mock.Mock(side_effect=MemoryError("no memory for a plan"))
    with (
        mock.patch.object(checkpoint_plan, "create_default_local_save_plan", fails),
        contextlib.redirect_stderr(shown),
    ):
        run.step()
        run.step()
        run.checkpoints.finish()
    return shown.getvalue()


def test_a_run_that_is_through_saves_its_result_without_a_last_checkpoint(two_ranks, tmp_path):
    told, nothing = two_ranks(cannot_plan_at_the_end, str(tmp_path))
    assert "WARNING: the checkpoint of step 2 could not be written (checkpoint: MemoryError: no" in told
    assert told.endswith("; there is no other one, and the result is saved\n")
    assert not nothing and not list(tmp_path.glob("checkpoints/*"))


def told_of_saves(place, folder: str) -> tuple[float, list[tuple[float, bool]]]:
    """What --max_minutes hears: of the run as it begins, and of a checkpoint that takes half a second beside steps."""
    run, save = SmallRun(place, folder, every=0, asked=1), checkpoints.dcp.save

    def slow(*args, **kwargs):
        time.sleep(0.5)
        save(*args, **kwargs)

    with mock.patch.object(checkpoints.dcp, "save", slow):
        for _ in range(3):
            run.step()
        run.buffers()
        for _ in range(3):
            run.step()
    run.checkpoints.finish()
    return run.checkpoints.stopping.expected, run.checkpoints.stopping.saves


def test_a_checkpoints_time_is_known_while_it_is_written_and_as_soon_as_it_is(one_rank, tmp_path):
    ((expected, saves),) = one_rank(told_of_saves, str(tmp_path))
    assert expected == 3 * 4 * (5 * 3 + 3) / checkpoints.SLOW
    assert [whole for _, whole in saves] == [False, False, True]
    assert saves[0][0] < saves[1][0] < 0.5 < saves[2][0]


def warnings_of_a_save(place, folder: str) -> list[str]:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        run = SmallRun(place, folder, every=1)
        run.step()
        run.check_saved()
        run.checkpoints.finish()
    return [str(w.message) for w in given]


def test_a_save_of_one_rank_warns_of_nothing(one_rank, tmp_path):
    assert one_rank(warnings_of_a_save, str(tmp_path)) == [[]]
