"""Start of ranks: their environment, CPUs and threads, and the server that they are forked from."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from launch import processes as launch
from launch import ranks as launch_ranks
from tests.helpers.programs import ROOT


def writes_its_environment(rank_info, path: Path) -> None:
    path.write_text(json.dumps(dict(os.environ)))


def test_a_rank_has_the_environment_of_its_parent(processes, tmp_path):
    """Also without a variable that the parent had when the fork server started, but no longer has."""
    del os.environ["PYTEST_CURRENT_TEST"]
    found = tmp_path / "environment.json"
    assert launch.start(writes_its_environment, 1, (found,), "localhost", None) == 0
    assert json.loads(found.read_text()) == os.environ


def count_cpus(rank_info, sets: list[set[int]], quota: float) -> int:
    """Return the CPUs of this rank, on a node whose ranks may run on these sets of CPUs."""
    with (
        mock.patch.object(os, "sched_getaffinity", lambda _: sets[rank_info.rank], create=True),
        mock.patch.object(launch_ranks, "read_cpu_quota", lambda: quota),
    ):
        return launch_ranks.count_cpus_per_rank(
            rank_info.local_rank, rank_info.rank, rank_info.local_world, rank_info.world
        )


@pytest.mark.parametrize(
    ("sets", "quota", "shares"),
    [
        ([range(0, 64, 2)] * 2, math.inf, [16, 16]),
        ([range(64)] * 2, 9.5, [4, 4]),  # docker run --cpus 9.5
        ([range(64)] * 2, 0.5, [1, 1]),
        ([range(12), range(12, 24)], math.inf, [12, 12]),  # as Slurm and mpirun bind them
        ([range(3)] * 2, math.inf, [1, 1]),
        ([range(1)] * 2, math.inf, [1, 1]),
        ([range(8), range(4, 24)], math.inf, [4, 10]),
    ],
)
def test_ranks_share_cpus(sets, quota, shares, two_ranks):
    assert two_ranks(count_cpus, list(map(set, sets)), quota) == shares


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
    ],
)
def test_a_containers_quota_limits_the_cpus(files, quota, tmp_path, monkeypatch):
    """Its CPUs are all of the machine's; more threads than it may run would wait for one another."""
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert launch_ranks.read_cpu_quota(tmp_path) == quota
    monkeypatch.setattr(launch_ranks, "read_cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert launch_ranks.count_cpus() == (64 if quota == math.inf else int(quota))


def test_ranks_of_other_nodes_take_no_cpus(two_ranks):
    assert two_ranks(alone_on_its_node) == [5, 5]


def alone_on_its_node(rank_info) -> int:
    with (
        mock.patch.object(os, "sched_getaffinity", lambda _: set(range(5)), create=True),
        mock.patch.object(launch_ranks, "read_cpu_quota", lambda: math.inf),
    ):
        return launch_ranks.count_cpus_per_rank(0, rank_info.rank, 1, rank_info.world)


@pytest.mark.parametrize(
    ("asked", "agent", "ranks", "threads"),
    [
        (None, False, 2, [7]),
        ("", False, 2, [7]),
        ("5", False, 2, []),
        ("1", False, 2, []),
        ("1", True, 2, [7]),
        ("1", True, 1, []),  # one rank: torchrun does not set it
        ("5", True, 2, []),
    ],
)
def test_threads_equal_cpus_unless_the_user_sets_them(asked, agent, ranks, threads, monkeypatch):
    """With one thread per CPU in each rank, an optimizer step takes 80 times as long."""
    for name, value in ("OMP_NUM_THREADS", asked), ("TORCHELASTIC_RUN_ID", "1" if agent else None):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    launch_ranks.set_torch_threads(7, ranks)
    assert set_to == threads


@pytest.mark.parametrize("gpu", [False, True])
def test_a_rank_starts_with_its_share_of_cpus(gpu, monkeypatch):
    """On GPUs as well: with --use_cpu_offload the optimizer runs on the CPU."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.setattr(launch_ranks, "set_current_device", lambda device: None)
    monkeypatch.setattr(launch_ranks, "reach_gpus", lambda device: None)
    monkeypatch.setattr(launch_ranks, "read_cpu_quota", lambda: math.inf)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda all, own, group: all.__setitem__(slice(None), [own] * 3)
    )
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    rank_info = launch_ranks.join_process_group(0, 3, 0)
    assert (set_to, rank_info.cpus, rank_info.device.type) == ([2], 2, "cuda" if gpu else "cpu")


def test_torch_is_imported_with_its_environment_variables(tmp_path):
    """train.py sets them itself: under torchrun it is the rank."""
    names = ("OMP_WAIT_POLICY", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    (tmp_path / "torch.py").write_text(f"import os\nprint([os.environ.get(n) for n in {names}])\nos._exit(0)")
    environment = {k: v for k, v in os.environ.items() if k not in names} | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-u", "train.py"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert shown.stdout == "['PASSIVE', 'expandable_segments:True', None]\n", shown.stderr


def writes_its_policy(rank_info, path: Path) -> None:
    path.write_text(os.environ["OMP_WAIT_POLICY"])


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_idle_threads_of_ranks_sleep(own, processes, tmp_path):
    os.environ.pop("OMP_WAIT_POLICY", None)
    if own:
        os.environ["OMP_WAIT_POLICY"] = own
    assert launch.start(writes_its_policy, 1, (tmp_path / "policy",), "localhost", None) == 0
    assert (tmp_path / "policy").read_text() == (own or "PASSIVE")


@pytest.fixture
def new_server(monkeypatch):
    """A fork server for one test, apart from the one that other tests use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    server = multiprocessing.forkserver.ForkServer()
    for name in ("ensure_running", "set_forkserver_preload", "connect_to_new_process"):
        monkeypatch.setattr(multiprocessing.forkserver, name, getattr(server, name))
    yield
    server._stop()


def test_a_fork_server_killed_while_it_imports_is_a_one_line_error(
    new_server, processes, monkeypatch, tmp_path, capfd
):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/fork_server.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch/processes.py"))
    monkeypatch.chdir(tmp_path)  # for a second server, if the first one has already ended
    status, err = launch.start(print, 2, (), "localhost", None), capfd.readouterr().err
    reason = "a process ended while it imported what ranks need; out of host memory is the usual cause"
    assert (status, err) == (1, f"error: {reason}\n")


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (BrokenPipeError(), launch.StartError, "a process ended while it imported"),
        (OSError(errno.EMFILE, "Too many open files"), OSError, "Too many open files"),
    ],
)
def test_ranks_started_before_a_failure_are_killed(error, raised, words, new_server, monkeypatch):
    started = [multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(60,)) for _ in "ab"]

    def start_processes(*_, **__):
        started[1].start()
        raise error

    multiprocessing.forkserver.set_forkserver_preload([])
    started[0].start()
    monkeypatch.setattr(launch.mp, "start_processes", start_processes)
    with pytest.raises(raised, match=words):
        launch._start_ranks(2, ())
    started[1].join(10)
    assert started[1].exitcode == -signal.SIGKILL and started[0].is_alive(), "it is not a rank"
    started[0].kill()
