"""What a checkpoint writes to disk, in which order, and what it reports to the run."""

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
from checkpoints.storage import checkpoint_folder, read_checkpoint
from files import tensors as tensor_files
from files.tensors import writev_tensors
from tests.helpers.saving import TENSORS, SmallRun


@pytest.mark.parametrize("taken", [3, 100, 5000])
def test_partial_writes_are_completed(taken, tmp_path, monkeypatch):
    """Each call gets two tensors and writes `taken` bytes: less than a tensor, or more."""
    monkeypatch.setattr(tensor_files, "MAX_BUFFERS_PER_WRITE", 2)
    calls, wrote = [], []

    def write_partly(descriptor: int, buffers: list) -> int:
        calls.append(len(buffers))
        wrote.append(os.write(descriptor, b"".join(buffers)[:taken]))
        return wrote[-1]

    monkeypatch.setattr(os, "writev", write_partly)
    writev_tensors(TENSORS, tmp_path / "copies")
    assert max(calls) == 2
    assert sum(wrote) == (tmp_path / "copies").stat().st_size, "the header as well"
    written = load_file(tmp_path / "copies")
    assert written.keys() == TENSORS.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in TENSORS.items())


def test_tensors_are_aligned_to_their_dtypes(tmp_path):
    odd = {
        "codes": torch.arange(3, dtype=torch.uint8),
        "half": torch.ones(3).half(),
        "number": torch.ones(1),
        "count": torch.ones(1, dtype=torch.int64),
    }
    writev_tensors(odd, tmp_path / "odd")
    for name, stored in tensor_files.list_tensors(tmp_path / "odd").items():
        assert stored.begin % odd[name].element_size() == 0, name


def save_integer_keys(rank_info, folder: str) -> None:
    run = SmallRun(rank_info, folder, every=1)
    run.checkpoints.describe_run = lambda: {"counts": {10: "a", 9: "b"}}
    run.step()
    run.checkpoints.finish()
    saved = read_checkpoint(checkpoint_folder(Path(folder), 1))  # checks the manifest's digest
    assert saved.run["counts"] == {"10": "a", "9": "b"}


def test_a_runs_description_may_have_integer_keys(one_rank, tmp_path):
    """JSON has only text keys, which sort in another order."""
    one_rank(save_integer_keys, str(tmp_path))


def order_of_a_save(rank_info, folder: str) -> list[str]:
    """Return the calls of fsync and rename, with paths relative to the RUN."""
    run, seen, sync, rename = SmallRun(rank_info, folder, every=1), [], os.fsync, os.rename

    def note(word: str, path) -> None:
        seen.append(f"{word} {os.path.relpath(path, folder)}")

    def fsync(descriptor: int) -> None:
        note("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def logged_rename(old, new) -> None:
        note("rename", old)
        rename(old, new)

    (Path(folder) / "metrics.jsonl").write_text("a line\n")
    with mock.patch.object(os, "fsync", fsync), mock.patch.object(os, "rename", logged_rename):
        run.step()
        run.check_saved()
        run.checkpoints.finish()
    return seen


def test_a_checkpoint_is_synced_before_it_is_renamed(one_rank, tmp_path):
    """So are the lines of metrics.jsonl that it refers to. Afterwards the folders of its name are synced."""
    new = "checkpoints/step-00000001.tmp"
    files = [f"{new}/rank-00000.safetensors", "metrics.jsonl", f"{new}/manifest.json", new]
    expected = [*(f"sync {name}" for name in files), f"rename {new}", "sync checkpoints", "sync ."]
    assert one_rank(order_of_a_save, str(tmp_path)) == [expected]


def cannot_plan_at_the_end(rank_info, folder: str) -> str:
    """Return what a run prints if its only checkpoint, at its end, cannot be planned."""
    run, shown = SmallRun(rank_info, folder, every=2), io.StringIO()
    fails = mock.Mock(side_effect=MemoryError("no memory for a plan"))
    with (
        mock.patch.object(checkpoint_plan, "create_default_local_save_plan", fails),
        contextlib.redirect_stderr(shown),
    ):
        run.step()
        run.step()
        run.checkpoints.finish()
    return shown.getvalue()


def test_a_finished_run_saves_its_result_without_its_last_checkpoint(two_ranks, tmp_path):
    printed, nothing = two_ranks(cannot_plan_at_the_end, str(tmp_path))
    assert "WARNING: the checkpoint of step 2 could not be written (checkpoint: MemoryError: no" in printed
    assert printed.endswith("; there is no other one, and the result is saved\n")
    assert not nothing and not list(tmp_path.glob("checkpoints/*"))


def record_save_times(rank_info, folder: str) -> tuple[float, list[tuple[float, bool]]]:
    """Return the (expected, actual) times of a half-second save that --max_minutes gets."""
    run, save = SmallRun(rank_info, folder, every=0, asked=1), checkpoints.dcp.save

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


def test_a_saves_time_is_reported_during_and_after_it(one_rank, tmp_path):
    ((expected, saves),) = one_rank(record_save_times, str(tmp_path))
    assert expected == 3 * 4 * (5 * 3 + 3) / checkpoints.SLOW_DISK_SPEED
    assert [whole for _, whole in saves] == [False, False, True]
    assert saves[0][0] < saves[1][0] < 0.5 < saves[2][0]


def warnings_of_a_save(rank_info, folder: str) -> list[str]:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        run = SmallRun(rank_info, folder, every=1)
        run.step()
        run.check_saved()
        run.checkpoints.finish()
    return [str(w.message) for w in given]


def test_a_save_of_one_rank_warns_of_nothing(one_rank, tmp_path):
    assert one_rank(warnings_of_a_save, str(tmp_path)) == [[]]
