"""Several nodes: a run under docs/slurm.sbatch with two torchrun agents, and errors if nodes disagree."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file, save_file

from checkpoints.storage import Checkpoint
from launch import nodes, ranks, torchrun
from launch import processes as launch
from launch.nodes import NodeResult, check_agreement
from options.errors import UserError
from options.train import parse
from tests.helpers.programs import ROOT
from tests.helpers.runs import train_run
from training.preflight import check_run

SRUN = """#!/bin/bash
# Replaces Slurm's srun: runs a command on both nodes, each with its own address.
while [[ $1 == --* ]]; do shift; done
{first} "$@" & a=$!
{second} "$@" & b=$!
wait $a && wait $b
"""


@pytest.fixture
def hosts(tmp_path):
    """Two (address, command prefix that runs a command on that host).

    A host is a network namespace if the machine allows that, else a loopback address.
    """
    names = [f"node{i}-{os.getpid()}" for i in range(2)]
    plan = [["netns", "add", name] for name in names]
    plan += [f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}".split()]
    for i, name in enumerate(names, 1):
        plan += [["-n", name, *words.split()] for words in (
            f"addr add 10.99.0.{i}/24 dev eth0", "link set eth0 up", "link set lo up")]  # fmt: skip
    allowed = shutil.which("ip") and all(
        subprocess.run(["ip", *step], capture_output=True).returncode == 0 for step in plan
    )
    if allowed:
        yield [
            (f"10.99.0.{i}", f"ip netns exec {name} env GLOO_SOCKET_IFNAME=eth0")
            for i, name in enumerate(names, 1)
        ]
    else:
        yield [(f"127.0.0.{i}", "env GLOO_SOCKET_IFNAME=lo") for i in (1, 2)]
    for name in names if shutil.which("ip") else ():
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_nodes_train_what_one_process_trains(hosts, checkpoints, alpaca_file, tmp_path, one_rank):
    tools = tmp_path / "bin"
    tools.mkdir()
    # torchrun would look these up by the host name, which is the same for both.
    lines = [
        f"{words} PET_LOCAL_ADDR={address} PET_RDZV_CONF=is_host={int(address == hosts[0][0])}"
        for address, words in hosts
    ]
    (tools / "srun").write_text(SRUN.format(first=lines[0], second=lines[1]))
    (tools / "scontrol").write_text(f"#!/bin/bash\necho {hosts[0][0]}; echo {hosts[1][0]}\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    options = ["--train_type", "qlora", "--lora_rank", "8", "--lr", "2e-3", "--max_steps", "2"]
    options += ["--model_name", str(checkpoints()), "--dataset", str(alpaca_file)]
    environment = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "2",
                   "SLURM_JOB_ID": str(os.getpid()), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                   "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    done = subprocess.run(
        ["bash", "docs/slurm.sbatch", *options, "--output_dir", str(tmp_path / "out"), "--batch_size", "2"],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" rows kept") == done.stdout.count("step 2/2: loss") == 1
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    chosen = [config[name] for name in ("world_size", "sharding_strategy", "hybrid_shard_size")]
    assert chosen == [4, "hybrid_full_shard", 2]
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    # The pool's adapters are random; untouched ones begin with B = 0, as the two nodes' did.
    expected = one_rank(untouched_run, [*options, "--batch_size", "8"])[0]
    torch.testing.assert_close([m["loss"] for m in lines], expected, rtol=1e-5, atol=0)


def untouched_run(rank_info, argv):
    """Train with adapters as they are created, and return the losses."""
    import tests.helpers.runs

    original, tests.helpers.runs.randomize = tests.helpers.runs.randomize, lambda model: None
    try:
        return train_run(rank_info, argv)[0]
    finally:
        tests.helpers.runs.randomize = original


# Two ranks of the pool as two nodes with one rank each.


@contextlib.contextmanager
def as_node(rank_info, folder: Path):
    """Environment and current folder of the only rank of a node."""
    variables = {
        "RANK": rank_info.rank,
        "WORLD_SIZE": rank_info.world,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "localhost",
    }
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def check_on(rank_info, folders, argvs):
    """Return (model folder, output_dir, strategy) of the job on this node, or the error."""
    with as_node(rank_info, folders[rank_info.rank]):
        try:
            job = nodes.check_on_nodes(
                lambda: check_run(parse(argvs[rank_info.rank])[0]), rank_info.rank, rank_info.world, 0, 7.5
            )
        except UserError as e:
            return str(e)
        assert job.started == 7.5
        return str(job.files.folder.resolve()), job.config.output_dir, job.config.sharding_strategy


@pytest.fixture(scope="module")
def two_nodes(checkpoints, alpaca_file, tmp_path_factory):
    """A folder for each node, each with its own copy of the same model and data."""
    folders = [tmp_path_factory.mktemp(f"node{i}") for i in range(2)]
    for folder in folders:
        shutil.copytree(checkpoints(), folder / "model")
        shutil.copy(alpaca_file, folder / "rows.jsonl")
    return folders


def arguments(node: int, *more) -> list[str]:
    return ["--model_name", "model", "--dataset", "rows.jsonl", "--output_dir", f"out{node}", *more]


def test_each_node_reads_its_own_files(two_nodes, two_ranks):
    found = two_ranks(check_on, two_nodes, [arguments(i, "--eval_share", "0.2") for i in range(2)])
    # With one rank per node nothing can be sharded within it. All nodes use rank 0's output folder.
    assert found == [(str(folder / "model"), "out0", "full_shard") for folder in two_nodes]


def chat_date_on(rank_info, folders, argvs) -> str | None:
    with as_node(rank_info, folders[rank_info.rank]):
        job = nodes.check_on_nodes(
            lambda: check_run(parse(argvs[rank_info.rank])[0]), rank_info.rank, rank_info.world, 0, 7.5
        )
        return job.config.chat_date


def test_nodes_on_two_sides_of_midnight(two_nodes, two_ranks):
    """All nodes use rank 0's day. If the rows contained it, they would differ, which is an error."""
    found = two_ranks(
        chat_date_on, two_nodes, [arguments(i, "--chat_date", f"2026-11-{29 + i}") for i in range(2)]
    )
    assert found == ["2026-11-29", "2026-11-29"]


def spoil_weight(folder: Path) -> None:
    path = next(p for p in folder.glob("model/*.safetensors") if "model.norm.weight" in load_file(p))
    tensors = load_file(path)
    tensors["model.norm.weight"][-1:] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def edit(name: str, old: str, new: str):
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


READS = "each reads its own files, which must be the same"
DISAGREEMENTS = {
    "option": (None, ["--seed", "7"], ["disagree on --seed: 42 on node 0", "7 on node 1"]),
    "weights": (spoil_weight, [], ["node 0", "node 1", "disagree on the weights:", READS]),
    "config": (edit("model/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), [],
               ["disagree on what config.json and the weights' shapes say:", READS]),
    "rows": (edit("rows.jsonl", "Say", "Sag"), [], ["disagree on the rows of the data:", READS]),
}  # fmt: skip


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_nodes_that_disagree(name, two_nodes, two_ranks, tmp_path):
    damage, options, words = DISAGREEMENTS[name]
    other = shutil.copytree(two_nodes[1], tmp_path / "other")
    if damage:
        damage(other)
    errors = two_ranks(check_on, [two_nodes[0], other], [arguments(0), arguments(1, *options)])
    assert errors[0] == errors[1] and [w for w in words if w not in errors[0]] == []


def test_nodes_that_see_other_checkpoints(two_nodes, two_ranks):
    """In a folder that they do not share: one would resume, the other start anew, and both wait for ever."""
    found = {"saved": Checkpoint(Path("checkpoints/step-00000003"), 3, {}, {})}
    errors = two_ranks(check_with, two_nodes, [arguments(i) for i in range(2)], found)
    assert errors[0] == errors[1]
    assert errors[0].startswith("the nodes disagree on the checkpoint to go on from: step 3 on node 0 (")
    assert "none on node 1" in errors[0]


def test_nodes_that_see_other_caches(two_nodes, two_ranks, tmp_path):
    """One would read the cache while the other waits for all ranks to write it."""
    options = ["--train_type", "qlora", "--quantized_cache", str(tmp_path / "cache")]
    errors = two_ranks(check_with, two_nodes, [arguments(i, *options) for i in range(2)], {"cache": None})
    assert errors[0] == errors[1]
    start = "the nodes disagree on what --quantized_cache holds: all that is needed on node 0 ("
    assert errors[0].startswith(start) and "nothing yet on node 1" in errors[0]


def check_with(rank_info, folders, argvs, found):
    """Return the error where the first node has other fields of Job, `found`."""
    found = found if rank_info.rank == 0 else {}
    with as_node(rank_info, folders[rank_info.rank]):
        try:
            nodes.check_on_nodes(
                lambda: replace(check_run(parse(argvs[rank_info.rank])[0]), **found),
                rank_info.rank,
                2,
                0,
                7.5,
            )
        except UserError as e:
            return str(e)


def test_all_nodes_report_the_error_of_one_node(two_nodes, two_ranks, tmp_path):
    other = shutil.copytree(two_nodes[1], tmp_path / "other")
    (other / "model" / "config.json").unlink()
    first, second = two_ranks(check_on, [two_nodes[0], other], [arguments(0), arguments(1)])
    assert second == "--model_name model: no config.json in this folder"
    assert first == f"node 1 ({socket.gethostname()}): {second}"


def check_on_a_full_disk(rank_info, folders, argvs) -> str:
    """Return the error of this node; the check of the second node fails because its disk is full."""

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with as_node(rank_info, folders[rank_info.rank]):
        checked = full if rank_info.rank else lambda: check_run(parse(argvs[rank_info.rank])[0])
        with pytest.raises(OSError if rank_info.rank else UserError) as e:
            nodes.check_on_nodes(checked, rank_info.rank, rank_info.world, 0, 7.5)
    return str(e.value)


def test_all_nodes_report_the_full_disk_of_one_node(two_nodes, two_ranks):
    first, second = two_ranks(check_on_a_full_disk, two_nodes, [arguments(i) for i in range(2)])
    assert second == "[Errno 28] No space left on device"
    assert first == f"node 1 ({socket.gethostname()}): OSError: {second}"


def test_different_node_sizes_are_reported_first():
    """Options whose defaults depend on the size differ then as well, but the user gave none of them."""
    found = {"LOCAL_WORLD_SIZE": "2", "--sharding_strategy": "hybrid_full_shard"}
    other = {"LOCAL_WORLD_SIZE": "1", "--sharding_strategy": "full_shard"}
    with pytest.raises(
        UserError, match=r"disagree on LOCAL_WORLD_SIZE: 2 on node 0 \(a\), 1 on node 1 \(b\)"
    ):
        check_agreement([NodeResult("a", facts=found), NodeResult("b", facts=other)])
    with pytest.raises(UserError, match=r"disagree on --new: unknown on node 0 \(a\), 1 on node 1 \(b\)"):
        check_agreement([NodeResult("a", facts=found), NodeResult("b", facts=found | {"--new": "1"})])


def check_shared_folder(rank_info, folder: str, shared: bool) -> str:
    """Return the error on a node with one rank, whose output folder is shared or not; "" without an error."""
    rank_info = replace(rank_info, local_rank=0, local_world=1)
    own = Path(folder, "all" if shared else str(rank_info.rank))
    own.mkdir(exist_ok=True)
    (own / "run.json").write_text("of an earlier run") if rank_info.rank else None
    dist.barrier()
    if rank_info.rank == 0:
        (own / "run.json").write_text("{}")
    try:
        with mock.patch.object(nodes, "PATIENCE", 1):
            nodes.check_output_is_shared(own / "run.json", rank_info)
    except UserError as e:
        return str(e)
    return ""


@pytest.mark.parametrize("shared", [True, False])
def test_a_run_with_checkpoints_needs_a_folder_that_all_nodes_see(shared, two_ranks, tmp_path):
    first, second = two_ranks(check_shared_folder, str(tmp_path), shared)
    assert first == "" and second.startswith(f"--output_dir {tmp_path}/1: what the first") != shared


@pytest.mark.parametrize(
    "world, local, wanted, chosen",
    [(8, 4, "auto", "hybrid_full_shard"), (8, 8, "auto", "full_shard"), (8, 1, "auto", "full_shard"),
     (8, 4, "full_shard", "full_shard"), (8, 4, "ddp", "ddp")],
)  # fmt: skip
def test_the_default_strategy(monkeypatch, world, local, wanted, chosen):
    ranks_of_a_node(monkeypatch, world, local)
    assert ranks.resolve_strategy(wanted, world) == chosen


def ranks_of_a_node(monkeypatch, world, local, rank="0") -> None:
    values = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": local,
        "MASTER_ADDR": "localhost",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("world, local", [(3, 2), (8, 3)])
def test_nodes_of_different_sizes(monkeypatch, world, local):
    ranks_of_a_node(monkeypatch, world, local)
    with pytest.raises(UserError, match=f"{local} of {world} ranks are on this node: all nodes must have"):
        ranks.local_world_size(world)


# Ranks that do not find one another


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(torchrun, "RENDEZVOUS_TIMEOUT", timedelta(seconds=1))


def test_ranks_that_do_not_come(monkeypatch, soon):
    ranks_of_a_node(monkeypatch, 2, 1)
    monkeypatch.setenv("MASTER_PORT", str(launch.find_free_port()))
    begun = time.time()
    with pytest.raises(UserError, match=r"^localhost:\d+: the ranks cannot meet here .*1/2 clients joined"):
        torchrun.rendezvous(0, 2)
    assert time.time() - begun < 20


def test_a_rank_without_the_first(monkeypatch, soon):
    ranks_of_a_node(monkeypatch, 2, 1, rank="1")
    monkeypatch.setenv("MASTER_PORT", str(launch.find_free_port()))
    with pytest.raises(
        UserError, match=r"^localhost:\d+: the ranks cannot meet here \(MASTER_ADDR, MASTER_PORT"
    ):
        torchrun.rendezvous(1, 2)


def test_a_node_of_torchrun_that_does_not_come(monkeypatch, soon):
    """The agents, which serve the store, are there; the ranks of one agent are missing."""
    ranks_of_a_node(monkeypatch, 2, 1)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(
        UserError, match="only 1 of 2 ranks came within 1 s; the other nodes' output says why"
    ):
        torchrun.rendezvous(0, 2)


def test_a_restart_keeps_the_start_time(monkeypatch):
    """--max_minutes counts from the first start; torchrun gives each start another prefix of its store."""
    ranks_of_a_node(monkeypatch, 1, 1)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    found = []
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        found.append(torchrun.rendezvous(0, 1)[1])
    assert found[0] == found[1] and 0 <= time.time() - found[0] < 60


def test_the_start_time_is_rank_0s(monkeypatch):
    """Also if another rank arrives first, from a node whose clock differs."""
    ranks_of_a_node(monkeypatch, 2, 1)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(
        dist, "rendezvous", lambda *_, **__: iter([(dist.TCPStore("localhost", store.port), 0, 2)])
    )
    clocks = {threading.main_thread(): 1000.0}
    clock = SimpleNamespace(time=lambda: clocks.get(threading.current_thread(), 2000.0))
    monkeypatch.setattr(torchrun, "time", clock)
    with ThreadPoolExecutor() as threads:
        other = threads.submit(torchrun.rendezvous, 1, 2)
        while store.add("arrived", 0) == 0 and not other.done():
            time.sleep(0.01)
        assert torchrun.rendezvous(0, 2)[1] == other.result()[1] == 1000.0


@pytest.mark.parametrize("verbose", [False, True])
def test_a_full_disk_under_torchrun_has_a_traceback_if_asked_for(verbose, monkeypatch, capsys):
    def prepare(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    ranks_of_a_node(monkeypatch, 2, 1)
    monkeypatch.setattr(torchrun, "rendezvous", lambda *_: (dist.HashStore(), 0.0))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="2"):
        torchrun.run_as_rank(None, prepare, verbose)
    err = capsys.readouterr().err
    assert err.endswith("error: rank 0: OSError: [Errno 28] No space left on device\n")
    assert err.startswith("Traceback") == verbose


@pytest.mark.parametrize(
    "name, value, message",
    [("WORLD_SIZE", "two", "WORLD_SIZE='two' in the environment: not a whole number"),
     ("MASTER_PORT", "", "MASTER_PORT='' in the environment: not a whole number"),
     ("RANK", "2", "RANK 2: must be below WORLD_SIZE 2")],
)  # fmt: skip
def test_wrong_environment_variables(monkeypatch, name, value, message):
    ranks_of_a_node(monkeypatch, 2, 1)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        torchrun.run_as_rank(None, None)


@pytest.mark.parametrize(
    "address, reason",
    [
        ("192.0.2.1", "Cannot assign requested address"),
        ("no.such.host.invalid", ""),
        ("", ""),
        ("x" * 300, ""),
        ("a\0", ""),
    ],
)
def test_addresses_of_other_machines(address, reason):
    with pytest.raises(UserError, match=rf"^--master_addr .*is no address of this machine \({reason}"):
        launch.check_address(address, None)


def test_a_port_in_use():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=f"^--master_port {port}: cannot be used .Address already in use.; leave"
        ):
            launch.check_address("localhost", port)
    launch.check_address("localhost", port)
    launch.check_address("127.0.0.1", None)
