"""The memory of checkpoints' copies is there before the first one is due, and only where there will be one."""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import background
import checkpoint_plan
import checkpoints
import tensor_files
from checkpoint_files import folder_of, read_checkpoint
from checkpoints import Checkpoints, HostCopy, host_memory
from launch import use
from stopping import NeverStop
from tensor_files import write_tensors
from training_state import Tensors, collect

LONG = 2.0  # seconds
TENSORS = {  # with the bytes of each, in whole ALIGNED
    "half": torch.randn(7).bfloat16(),  # 64
    "codes": torch.arange(250, dtype=torch.uint8),  # 256
    "number": torch.tensor(3.0),  # 64
    "empty": torch.empty(0, 5),
    "matrix": torch.randn(30, 40).t(),  # 4800
    "count": torch.tensor([2**40]),  # 64
    "many": torch.randn(450),  # 1856
    "more": torch.randn(100),  # 448
}


class Asking(NeverStop):
    """A checkpoint is asked for after one step, as a signal does."""

    def __init__(self, at: int):
        self.at, self.done = at, 0
        self.expected, self.saves = 0.0, []

    def agree(self, last):
        self.done += 1
        return False, self.done == self.at

    def expect_save(self, seconds):
        self.expected = seconds

    def saved_in(self, seconds, whole=True):
        self.saves.append((seconds, whole))


class Slow:
    """In place of `host_memory`: takes its time, and notes what was allocated, and whether by the thread that trains."""

    def __init__(self, failure: str = ""):
        self.failure, self.names, self.by_training = failure, [], set()

    def __call__(self, tensors: Tensors, pin: bool) -> Tensors:
        if not tensors:
            return {}
        self.names += tensors
        self.by_training.add(threading.current_thread() is threading.main_thread())
        time.sleep(0.2)
        if self.failure:
            raise RuntimeError(self.failure)
        return host_memory(tensors, pin)


class Small:
    """A run of a small model."""

    def __init__(self, place, folder: str, every: int, asked: int = 0):
        self.model, self.place, self.done = nn.Linear(5, 3).to(place.device), place, 0
        self.optimizer, self.said = torch.optim.AdamW(self.model.parameters()), []
        self.checkpoints = Checkpoints(
            Path(folder),
            self.model,
            self.optimizer,
            {},
            place,
            every=every,
            at_end=every > 0,
            keep=-1,
            describe_run=dict,
            settle=lambda: None,
            stopping=Asking(asked),
            say=self.said.append,
            saved=None,
        )

    def step(self, left_out: bool = False) -> None:
        """left_out: by the optimizer, as a bad step is."""
        self.done += 1
        self.model(torch.randn(2, 5, device=self.place.device)).sum().backward()
        if not left_out:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.checkpoints.after(self.done, last=False)

    def buffers(self) -> Tensors:
        self.checkpoints.pool.submit(int).result()  # after all that was begun
        return self.checkpoints.copy.buffers

    def local(self) -> Tensors:
        return collect(self.checkpoints.trained, self.optimizer, self.place.rank)[1]

    def check_saved(self) -> None:
        """That the last step's checkpoint holds what there is now."""
        self.buffers()
        folder = read_checkpoint(folder_of(self.checkpoints.folder, self.done)).folder
        saved = load_file(folder / "rank-00000.safetensors")
        assert saved.keys() == self.local().keys()
        assert all(torch.equal(saved[name], tensor.cpu()) for name, tensor in self.local().items())


def regular(place, folder: str) -> None:
    run = Small(place, folder, every=3)
    run.step()
    there = {name: buffer.data_ptr() for name, buffer in run.buffers().items()}
    assert (
        there.keys() == run.local().keys() and len(there) >= 2 * 4 + 1
    )  # weight and bias, each with 3 states
    for name, tensor in run.local().items():
        buffer = run.buffers()[name]
        assert (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)
        assert buffer.is_pinned() == (run.checkpoints.copy.pin and tensor.is_cuda)
    assert not (Path(folder) / "checkpoints").exists()
    for step in range(2, 8):
        run.step()
        if step in (3, 6):
            run.check_saved()
    assert {name: buffer.data_ptr() for name, buffer in run.buffers().items()} == there
    run.checkpoints.finish()
    (said,) = run.said
    assert re.fullmatch(r"checkpoints: 2; training stood still for 0\.\d+ s for each, 0\.\d+ s at most", said)


def test_memory_is_there_before_the_first_checkpoint_is_due(one_rank, tmp_path):
    one_rank(regular, str(tmp_path))


def left_out(place, folder: str) -> None:
    """fp16 begins with steps that are left out, after which the optimizer has no states."""
    run = Small(place, folder, every=100)
    assert run.optimizer.state[run.model.weight] == {}  # as some optimizers have it from the start
    run.step(left_out=True)
    assert not run.buffers()
    run.step()
    assert run.buffers().keys() == run.local().keys()
    run.checkpoints.finish()


def test_memory_is_for_the_optimizers_states_too(one_rank, tmp_path):
    one_rank(left_out, str(tmp_path))


def none_due(place, folder: str) -> None:
    run = Small(place, folder, every=0)
    for _ in range(3):
        run.step()
    assert not run.buffers()
    run.checkpoints.finish()
    assert not run.said


def test_a_run_without_checkpoints_allocates_nothing(one_rank, tmp_path):
    one_rank(none_due, str(tmp_path))


def asked_for(place, folder: str, every: int, at: int) -> set[bool]:
    run = Small(place, folder, every, at)
    with mock.patch.object(checkpoints, "host_memory", Slow()) as slow:
        for _ in range(at):
            run.step()
        run.check_saved()
        run.step()
        run.checkpoints.finish()
    assert sorted(slow.names) == sorted(run.local()), "each once"
    return slow.by_training


@pytest.mark.parametrize(("every", "at"), [(100, 2), (100, 1), (0, 2)])
def test_a_checkpoint_may_be_asked_for_at_any_time(every, at, one_rank, tmp_path):
    """While its memory is being allocated, before that has begun, and where there was to be none."""
    assert one_rank(asked_for, str(tmp_path), every, at) == [{False}]


def overtaken(place, folder: str) -> None:
    run, copy = Small(place, folder, every=2), HostCopy._copy

    def late(self, local: Tensors) -> Tensors:
        time.sleep(0.3)
        return copy(self, local)

    with mock.patch.object(HostCopy, "_copy", late):
        run.step()
        began = time.perf_counter()
        run.step()
        assert time.perf_counter() - began < 0.2, "training waits for the copies"
        expected = {name: tensor.clone() for name, tensor in run.local().items() if "random" not in name}
        run.step()
    run.checkpoints.finish()
    assert float(re.search(r"stood still for (\S+) s", run.said[0])[1]) > 0.2, "the third step waited"
    saved = load_file(folder_of(Path(folder), 2) / "rank-00000.safetensors")
    assert len(expected) == 2 * 4
    assert all(torch.equal(saved[name], tensor.cpu()) for name, tensor in expected.items())
    assert not torch.equal(saved["model.weight"], run.model.weight.cpu()), "the third step changed nothing"


def test_the_next_step_does_not_change_what_is_still_to_be_copied(one_rank, tmp_path):
    one_rank(overtaken, str(tmp_path))


def without_memory(place, folder: str) -> None:
    run = Small(place, folder, every=2)
    with mock.patch.object(checkpoints, "host_memory", Slow("no memory")):
        run.step()
        run.step()
        with pytest.raises(RuntimeError, match="no memory"):
            run.step()
    with pytest.raises(RuntimeError, match="no memory"):
        run.checkpoints.finish()
    assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())


def test_a_host_without_memory_ends_the_run(one_rank, tmp_path):
    one_rank(without_memory, str(tmp_path))


def test_copies_lie_together_and_are_written_each_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PIECE", 2048)
    copy = HostCopy(torch.device("cpu"))
    copies = copy.take(TENSORS)
    assert all(torch.equal(copies[name], tensor) for name, tensor in TENSORS.items()), "none over another"
    pieces = {
        c.untyped_storage().data_ptr(): c.untyped_storage().nbytes() for c in copies.values() if c.nbytes
    }
    assert sorted(pieces.values()) == [448, 2048, 2048, 4800], (
        "no more than PIECE or a tensor, nor than what is left"
    )
    write_tensors(copies, tmp_path / "copies")
    written = load_file(tmp_path / "copies")
    assert written.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("taken", [3, 100, 5000])
def test_what_the_disk_takes_in_parts_is_whole(taken, tmp_path, monkeypatch):
    """Two tensors in a call, of which it takes some bytes: those before others' end, just these, or more."""
    monkeypatch.setattr(tensor_files, "MOST_WRITTEN", 2)
    calls, wrote = [], []

    def some(descriptor: int, buffers: list) -> int:
        calls.append(len(buffers))
        wrote.append(os.write(descriptor, b"".join(buffers)[:taken]))
        return wrote[-1]

    monkeypatch.setattr(os, "writev", some)
    write_tensors(TENSORS, tmp_path / "copies")
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
    write_tensors(odd, tmp_path / "odd")
    for name, stored in tensor_files.list_tensors(tmp_path / "odd").items():
        assert stored.begin % odd[name].element_size() == 0, name


def counting_by_numbers(place, folder: str) -> None:
    run = Small(place, folder, every=1)
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
    run, seen, sync, rename = Small(place, folder, every=1), [], os.fsync, os.rename

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


@contextlib.contextmanager
def resting(run: Small, seconds: float):
    """The thread rests as beside a GPU, and long."""
    run.checkpoints.background.rests = True
    with mock.patch.object(background, "REST", seconds), mock.patch.object(background, "TURN", 0.0):
        yield


def rest_and_finish(place, folder: str) -> tuple[bool, float]:
    """Whether a save beside which training goes on is at rest, and how long it takes once it is waited for."""
    run = Small(place, folder, every=1)
    with resting(run, LONG):
        run.step()
        time.sleep(0.5)
        at_rest, began = not run.checkpoints.writing.done(), time.perf_counter()
        run.checkpoints.finish()
        return at_rest, time.perf_counter() - began


def test_a_save_rests_beside_training_and_not_when_it_is_waited_for(one_rank, tmp_path):
    ((at_rest, seconds),) = one_rank(rest_and_finish, str(tmp_path))
    assert at_rest and seconds < LONG / 2


def cannot_plan_at_the_end(place, folder: str) -> str:
    """What a run shows whose only checkpoint is that of its end, and cannot be planned."""
    run, shown = Small(place, folder, every=2), io.StringIO()
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
    run, save = Small(place, folder, every=0, asked=1), checkpoints.dcp.save

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


def test_memory_that_is_not_page_locked_any_more_will_do(monkeypatch):
    made = torch.empty

    def empty(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return made(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    room = host_memory(TENSORS, pin=True)
    assert {name: (t.shape, t.dtype) for name, t in room.items()} == {
        name: (t.shape, t.dtype) for name, t in TENSORS.items()
    }


def preparations(place, folder: str, every: int) -> list[tuple[int, int]]:
    """(step of the last checkpoint, calls to prepare for them) after each step of a run that begins, and of one that goes on."""
    seen = []
    run = Small(place, folder, every)
    for goes_on in (False, True):
        if goes_on:
            run = Small(place, folder, every)
            run.checkpoints.saved = read_checkpoint(folder_of(Path(folder), 4))
            run.done = run.checkpoints.load()
        told = run.checkpoints.background
        with mock.patch.object(told, "prepare") as prepare, mock.patch.object(told, "finish") as finish:
            for _ in range(4):
                run.step()
                seen.append((run.checkpoints.step, prepare.call_count))
            run.checkpoints.finish()
        assert finish.call_count == 1
    return seen


@pytest.mark.parametrize("every", [1, 4])
def test_the_collector_is_told_once_before_the_first_save(every, one_rank, tmp_path):
    """Of a run that goes on as well, and with nothing before the first step's."""
    steps = [step if every == 1 else step // 4 * 4 for step in range(1, 9)]
    assert one_rank(preparations, str(tmp_path), every) == [[(step, 1) for step in steps]]


def plans(place, folder: str) -> list[int]:
    """How often tensors have been described to the other ranks after each of some steps, in the last of which another
    parameter has its first gradient."""
    run, seen = Small(place, folder, every=2), []
    weight, bias = run.model.parameters()
    with mock.patch.object(
        checkpoint_plan,
        "create_default_local_save_plan",
        wraps=checkpoint_plan.create_default_local_save_plan,
    ) as described:
        for step in range(1, 7):
            bias.requires_grad_(step > 4)  # as an expert's that no token is sent to: it has no state yet
            run.step()
            run.buffers()
            seen.append(described.call_count)
            if step % 2 == 0:
                run.check_saved()
        run.checkpoints.finish()
    assert len(run.optimizer.state[bias]) == len(run.optimizer.state[weight]) > 0
    return seen


def test_a_plan_is_made_before_the_first_checkpoint_and_again_for_what_is_new(one_rank, tmp_path):
    assert one_rank(plans, str(tmp_path)) == [[1, 1, 1, 1, 1, 2]]


def update_beside_a_plan(place, folder: str) -> tuple[bool, float, bool]:
    """Whether a plan is at rest when a checkpoint is begun, how long the next update then waits, and whether the save
    rests again after it."""
    run = Small(place, folder, every=2)
    with resting(run, LONG):
        run.step()
        time.sleep(0.5)
        at_rest = not run.checkpoints.planner.described
        run.step()
        began = time.perf_counter()
        run.step()
        seconds = time.perf_counter() - began
        again = not run.checkpoints.background.hurry.is_set()
        run.checkpoints.finish()
    return at_rest, seconds, again


def test_a_plan_that_rests_does_not_hold_up_the_update_after_a_save(one_rank, tmp_path):
    ((at_rest, seconds, again),) = one_rank(update_beside_a_plan, str(tmp_path))
    assert at_rest and seconds < LONG / 2 and again


def end_beside_a_plan(place, folder: str) -> float:
    run = Small(place, folder, every=100)
    with resting(run, LONG):
        run.step()
        began = time.perf_counter()
        run.checkpoints.finish()
        return time.perf_counter() - began


def test_a_plan_that_rests_does_not_hold_up_the_end(one_rank, tmp_path):
    """Of a run that ends before its first checkpoint."""
    (seconds,) = one_rank(end_beside_a_plan, str(tmp_path))
    assert seconds < LONG / 2


def cannot_plan(place, folder: str, rank: int, times: int) -> list[str]:
    """What the steps raise where a rank has no memory for its first plans."""
    failures = [MemoryError("no memory for a plan")] * times if place.rank == rank else []
    plan, raised = checkpoint_plan.create_default_local_save_plan, []

    def fails(*args):
        if failures:
            raise failures.pop()
        return plan(*args)

    run = Small(place, folder, every=2)
    with mock.patch.object(checkpoint_plan, "create_default_local_save_plan", fails):
        for step in (run.step, run.step, run.buffers, run.step):
            try:
                step()
            except RuntimeError as e:
                raised.append(str(e))
    run.checkpoints.finish()
    return raised


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_could_not_plan_ahead_plans_at_the_first_checkpoint(rank, two_ranks, tmp_path):
    assert two_ranks(cannot_plan, str(tmp_path), rank, 1) == [[], []]
    saved = read_checkpoint(folder_of(tmp_path, 2))
    assert saved.tensors.keys() >= {"model.weight", "model.bias"}


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_hears_of_one_that_cannot_plan(rank, two_ranks, tmp_path):
    """At the first checkpoint, in the step after it if another one is not due for long."""
    assert (
        two_ranks(cannot_plan, str(tmp_path), rank, 9)
        == [["checkpoint: MemoryError: no memory for a plan"]] * 2
    )
    assert not (tmp_path / "checkpoints" / "step-00000002").exists()


def test_the_thread_uses_the_ranks_gpu():
    with mock.patch.object(torch.cuda, "set_device") as set_device:
        use(torch.device("cpu"))
        assert not set_device.called
        use(device := torch.device("cuda", 1))
    set_device.assert_called_once_with(device)


def device_of_the_thread(place, folder: str) -> bool:
    with mock.patch.object(checkpoints, "use", wraps=use) as first:
        run = Small(place, folder, every=1)
        run.step()
        run.checkpoints.finish()
    return first.call_args_list == [mock.call(place.device)]


def test_the_thread_is_told_of_the_ranks_device(one_rank, tmp_path):
    assert one_rank(device_of_the_thread, str(tmp_path)) == [True]


def gpus_in_use(place, folder: str) -> list[bool]:
    run = Small(place, folder, every=2)
    for _ in range(4):
        run.step()
    run.checkpoints.finish()
    return [torch._C._cuda_hasPrimaryContext(gpu) for gpu in range(torch.cuda.device_count())]


@pytest.mark.two_gpus
def test_a_rank_that_saves_uses_no_others_gpu(two_ranks, tmp_path):
    for rank, used in enumerate(two_ranks(gpus_in_use, str(tmp_path))):
        assert used == [gpu == rank for gpu in range(len(used))]


def warnings_of_a_save(place, folder: str) -> list[str]:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        run = Small(place, folder, every=1)
        run.step()
        run.check_saved()
        run.checkpoints.finish()
    return [str(w.message) for w in given]


def test_a_save_of_one_rank_warns_of_nothing(one_rank, tmp_path):
    assert one_rank(warnings_of_a_save, str(tmp_path)) == [[]]
