"""Host memory for copies is allocated before the first checkpoint is due, and only if there will be one."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import host_copy
from checkpoints import manager as checkpoints
from checkpoints.host_copy import HostCopy, allocate_host_buffers
from checkpoints.storage import checkpoint_folder
from checkpoints.training_state import Tensors
from files.tensors import writev_tensors
from launch.devices import set_current_device
from tests.helpers.saving import TENSORS, SmallRun


class SlowAllocation:
    """A slow `allocate_host_buffers`.

    Attributes:
        names: The tensors that buffers were allocated for.
        by_training: The set of answers to: did the training thread allocate?
    """

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
        return allocate_host_buffers(tensors, pin)


def regular(rank_info, folder: str) -> None:
    run = SmallRun(rank_info, folder, every=3)
    run.step()
    addresses = {name: buffer.data_ptr() for name, buffer in run.buffers().items()}
    # Weight and bias, each with 3 states.
    assert addresses.keys() == run.local().keys() and len(addresses) >= 2 * 4 + 1
    for name, tensor in run.local().items():
        buffer = run.buffers()[name]
        assert (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)
        assert buffer.is_pinned() == (run.checkpoints.host_copy.pin and tensor.is_cuda)
    assert not (Path(folder) / "checkpoints").exists()
    for step in range(2, 8):
        run.step()
        if step in (3, 6):
            run.check_saved()
    assert {name: buffer.data_ptr() for name, buffer in run.buffers().items()} == addresses
    run.checkpoints.finish()
    (line,) = run.printed
    assert re.fullmatch(r"checkpoints: 2; training paused for 0\.\d+ s for each, 0\.\d+ s at most", line)


def test_buffers_are_allocated_before_the_first_checkpoint_is_due(one_rank, tmp_path):
    one_rank(regular, str(tmp_path))


def skip_first_step(rank_info, folder: str) -> None:
    """fp16 skips its first steps; the optimizer has no state after them."""
    run = SmallRun(rank_info, folder, every=100)
    assert run.optimizer.state[run.model.weight] == {}  # as some optimizers have it from the start
    run.step(left_out=True)
    assert not run.buffers()
    run.step()
    assert run.buffers().keys() == run.local().keys()
    run.checkpoints.finish()


def test_buffers_wait_for_the_optimizers_state(one_rank, tmp_path):
    one_rank(skip_first_step, str(tmp_path))


def none_due(rank_info, folder: str) -> None:
    run = SmallRun(rank_info, folder, every=0)
    for _ in range(3):
        run.step()
    assert not run.buffers()
    run.checkpoints.finish()
    assert not run.printed


def test_a_run_without_checkpoints_allocates_nothing(one_rank, tmp_path):
    one_rank(none_due, str(tmp_path))


def save_on_request(rank_info, folder: str, every: int, at: int) -> set[bool]:
    run = SmallRun(rank_info, folder, every, at)
    with mock.patch.object(host_copy, "allocate_host_buffers", SlowAllocation()) as slow:
        for _ in range(at):
            run.step()
        run.check_saved()
        run.step()
        run.checkpoints.finish()
    assert sorted(slow.names) == sorted(run.local()), "each once"
    return slow.by_training


@pytest.mark.parametrize(("every", "at"), [(100, 2), (100, 1), (0, 2)])
def test_a_checkpoint_may_be_requested_at_any_time(every, at, one_rank, tmp_path):
    """During the allocation of its buffers, before it, and in a run without regular checkpoints."""
    assert one_rank(save_on_request, str(tmp_path), every, at) == [{False}]


def update_during_copy(rank_info, folder: str) -> None:
    run, copy = SmallRun(rank_info, folder, every=2), HostCopy._copy

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
    assert float(re.search(r"paused for (\S+) s", run.printed[0])[1]) > 0.2, "the third step waited"
    saved = load_file(checkpoint_folder(Path(folder), 2) / "rank-00000.safetensors")
    assert len(expected) == 2 * 4
    assert all(torch.equal(saved[name], tensor.cpu()) for name, tensor in expected.items())
    assert not torch.equal(saved["model.weight"], run.model.weight.cpu()), "the third step changed nothing"


def test_the_next_update_waits_for_the_copies(one_rank, tmp_path):
    one_rank(update_during_copy, str(tmp_path))


def without_memory(rank_info, folder: str) -> None:
    run = SmallRun(rank_info, folder, every=2)
    with mock.patch.object(host_copy, "allocate_host_buffers", SlowAllocation("no memory")):
        run.step()
        run.step()
        with pytest.raises(RuntimeError, match="no memory"):
            run.step()
    with pytest.raises(RuntimeError, match="no memory"):
        run.checkpoints.finish()
    assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())


def test_a_host_without_memory_ends_the_run(one_rank, tmp_path):
    one_rank(without_memory, str(tmp_path))


def test_copies_share_allocations_and_are_written_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(host_copy, "CHUNK_BYTES", 2048)
    copy = HostCopy(torch.device("cpu"))
    copies = copy.start(TENSORS)
    assert all(torch.equal(copies[name], tensor) for name, tensor in TENSORS.items()), "no buffers overlap"
    allocations = {
        c.untyped_storage().data_ptr(): c.untyped_storage().nbytes() for c in copies.values() if c.nbytes
    }
    assert sorted(allocations.values()) == [448, 2048, 2048, 4800], (
        "at most CHUNK_BYTES or one tensor, and no more than the rest needs"
    )
    writev_tensors(copies, tmp_path / "copies")
    written = load_file(tmp_path / "copies")
    assert written.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=0)


def test_buffers_fall_back_to_memory_that_is_not_page_locked(monkeypatch):
    made = torch.empty

    def empty(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return made(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    buffers = allocate_host_buffers(TENSORS, pin=True)
    assert {name: (t.shape, t.dtype) for name, t in buffers.items()} == {
        name: (t.shape, t.dtype) for name, t in TENSORS.items()
    }


def test_the_thread_uses_the_ranks_gpu():
    with mock.patch.object(torch.cuda, "set_device") as set_device:
        set_current_device(torch.device("cpu"))
        assert not set_device.called
        set_current_device(device := torch.device("cuda", 1))
    set_device.assert_called_once_with(device)


def device_of_the_thread(rank_info, folder: str) -> bool:
    with mock.patch.object(checkpoints, "set_current_device", wraps=set_current_device) as first:
        run = SmallRun(rank_info, folder, every=1)
        run.step()
        run.checkpoints.finish()
    return first.call_args_list == [mock.call(rank_info.device)]


def test_the_background_thread_uses_the_ranks_device(one_rank, tmp_path):
    assert one_rank(device_of_the_thread, str(tmp_path)) == [True]


def gpus_in_use(rank_info, folder: str) -> list[bool]:
    run = SmallRun(rank_info, folder, every=2)
    for _ in range(4):
        run.step()
    run.checkpoints.finish()
    return [torch._C._cuda_hasPrimaryContext(gpu) for gpu in range(torch.cuda.device_count())]


@pytest.mark.two_gpus
def test_a_rank_that_saves_uses_no_others_gpu(two_ranks, tmp_path):
    for rank, used in enumerate(two_ranks(gpus_in_use, str(tmp_path))):
        assert used == [gpu == rank for gpu in range(len(used))]
