"""What is said when NCCL hangs or gets no shared memory. Here without NCCL, which needs GPUs."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from launch import nccl, torchrun
from launch import processes as launch
from launch import ranks as launch_ranks

# As torch writes it.
NO_SHARED_MEMORY = (
    "NCCL error in: NCCLUtils.cpp:77, unhandled system error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
    "Last error:\nError while creating shared memory segment /dev/shm/nccl-vzIpS6 (size 9637888),"
    " error: No space left on device (28)"
)


@pytest.mark.parametrize(
    ("local_rank", "local_world", "own", "told"),
    [(0, 2, None, True), (1, 2, None, False), (0, 1, None, False), (0, 2, "1", False)],
)
def test_a_group_that_hangs_is_told_the_variable_that_helps(
    local_rank, local_world, own, told, monkeypatch, capfd
):
    """One rank of a node prints it, once, and goes on waiting. The first sum hangs, as with broken links."""
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    if own:
        monkeypatch.setenv("NCCL_P2P_DISABLE", own)
    joined, hangs, tensor = [], threading.Event(), torch.ones(())
    monkeypatch.setattr(nccl, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(launch_ranks, "local_world_size", lambda world: local_world)
    monkeypatch.setattr(launch_ranks, "set_current_device", lambda device: None)
    monkeypatch.setattr(launch_ranks, "count_cpus_per_rank", lambda *_: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: tensor)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: joined.append("group"))
    monkeypatch.setattr(dist, "all_reduce", lambda _: joined.append("sum") or hangs.wait(0.8))
    launch_ranks.join_process_group(local_rank, 2, local_rank)
    assert joined == ["group", "sum"]
    out = capfd.readouterr().out
    assert out.count("\n") == told == out.count("NCCL_P2P_DISABLE=1")


def test_a_group_that_answers_is_told_nothing(monkeypatch, capfd):
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.setattr(nccl, "SILENCE_SECONDS", 0.2)
    with nccl.tell_of_silence(0, 2):
        pass
    threading.Event().wait(0.4)
    assert capfd.readouterr().out == ""


def raise_for_want_of_shared_memory(rank_info) -> None:
    raise dist.DistBackendError(NO_SHARED_MEMORY)


def assert_says_what_helps(err: str) -> None:
    assert err.startswith("error: rank 0: NCCL gets no shared memory") and err.count("\n") == 1
    assert "NCCL_SHM_DISABLE=1" in err and "--shm-size" in err and "(size 9637888)" in err


def test_a_full_dev_shm_is_a_one_line_error(processes, capfd):
    assert launch.start(raise_for_want_of_shared_memory, 1, (), "localhost", None) == 2
    assert_says_what_helps(capfd.readouterr().err)


def test_a_full_dev_shm_is_a_one_line_error_under_torchrun(monkeypatch, capfd):
    monkeypatch.setattr(torchrun, "read_env_int", {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.get)
    monkeypatch.setattr(torchrun, "rendezvous", lambda *_: raise_for_want_of_shared_memory(None))
    monkeypatch.setattr(torchrun.os, "_exit", lambda status: exec(f"raise SystemExit({status})"))
    with pytest.raises(SystemExit, match="2"):
        torchrun.run_as_rank(print, print)
    assert_says_what_helps(capfd.readouterr().err)


def test_other_errors_stay_as_they_are():
    for error in (dist.DistBackendError("NCCL error"), RuntimeError(NO_SHARED_MEMORY)):
        assert nccl.explain_nccl_error(error) is error
