"""All-gathers and reduce-scatters by copy engines.

Without GPUs, files replace the buffers, to show what FSDP2 does with them. The engines need two GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import wrapping
from models.loss import all_gather, reduce_scatter, shard_mesh
from options.errors import UserError
from parallel import copy_engines
from parallel.copy_engines import Buffers, CopiedAllGather, CopiedReduceScatter, Trial, make_copy_collectives
from tests.helpers.parity import arguments, assert_same
from tests.helpers.products import products
from tests.helpers.runs import train_run

CASES = [  # elements of a rank, dtype: buffers are made, reused, and too small
    (1000, torch.float32),
    (1000, torch.float32),
    (24, torch.bfloat16),
    (4096, torch.uint8),
    (3, torch.float16),
]

on_cpus = pytest.mark.skipif(torch.cuda.is_available(), reason="for ranks on CPUs")


class FileBuffer:
    """A Buffer on a CPU: every rank's part is a file that all map."""

    def __init__(self, folder: Path, n_ranks: int, n_bytes: int, device: torch.device):
        self.folder, self.n_bytes, self.user = folder, n_bytes, lambda: None

    def map(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, folder, n = group, group.rank(), self.folder, self.n_bytes
        number, size = len(list(folder.glob(f"*-{self.rank}"))), max(n, 1)
        dist.barrier(group)
        paths = [folder / f"{number}-{rank}" for rank in range(group.size())]
        paths[self.rank].write_bytes(bytes(size))
        dist.barrier(group)
        self.parts = [torch.from_file(str(p), shared=True, size=size, dtype=torch.uint8)[:n] for p in paths]

    other_ranks = copy_engines.Buffer.other_ranks

    def barrier(self) -> None:
        dist.barrier(self.group)


def make_file_copies(folder: Path, mesh, used: list | None = None):
    """`make_copy_collectives` over files. used: a list to append the Buffers to."""
    shards = shard_mesh(mesh)
    if shards.size() == 1:
        return None
    group = shards.get_group()
    group_folder = folder / str(dist.get_process_group_ranks(group)[0])
    folders = [group_folder / "gathered", group_folder / "summed"]
    for each in folders:
        each.mkdir(parents=True, exist_ok=True)
    gathered, summed = (
        Buffers(group, functools.partial(FileBuffer, each), max_waste)
        for each, max_waste in zip(folders, (copy_engines.MAX_WASTE, math.inf), strict=True)
    )
    if used is not None:
        used += [gathered, summed]
    return CopiedAllGather(gathered), CopiedReduceScatter(summed)


def compare(device: torch.device, copies, group: dist.ProcessGroup) -> None:
    """Assert that the copies' results are those of the group's own collectives."""
    gather, scatter = copies
    rank, world = group.rank(), group.size()
    generator = torch.Generator().manual_seed(rank)
    for n, dtype in [*CASES, *CASES]:
        given = torch.randint(64, (world, n), generator=generator).to(device, dtype)
        expected = torch.empty_like(given).flatten()
        all_gather(expected, given[rank].clone(), group=group)
        gathered = gather.allocate((world * n,), dtype=dtype, device=device)
        part = gathered[rank * n : (rank + 1) * n]
        part.copy_(given[rank])
        assert gather(gathered, part, group) is None
        assert torch.equal(gathered, expected)
        if dtype == torch.float32:
            expected, result = torch.empty_like(given[0]), torch.empty_like(given[0])
            reduce_scatter(expected, given.flatten(), group=group)
            scatter(result, given.flatten(), group, dist.ReduceOp.SUM)
            assert torch.equal(result, expected)


def compare_files(rank_info, folder: str) -> None:
    mesh = init_device_mesh("cpu", (rank_info.world,))
    compare(rank_info.device, make_file_copies(Path(folder), mesh), mesh.get_group())


@on_cpus
@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
def test_every_rank_gets_the_others_data(pool, request, tmp_path):
    request.getfixturevalue(pool)(compare_files, str(tmp_path))


def run_with(replacement, rank_info, args: list) -> tuple:
    """`train_run`'s results, with another `make_copy_collectives`."""
    original, wrapping.make_copy_collectives = wrapping.make_copy_collectives, replacement
    try:
        return train_run(rank_info, args)
    finally:
        wrapping.make_copy_collectives = original


def run_with_files(rank_info, folder: str, args: list) -> tuple:
    """(`train_run`'s results, number of buffers that it made for each purpose)."""
    used: list[Buffers] = []
    result = run_with(lambda mesh: make_file_copies(Path(folder), mesh, used), rank_info, args)
    return result, [len(buffers.all) for buffers in used]


OPTIONS = [
    "--use_gradient_checkpointing true",
    "--use_gradient_checkpointing true --wrap_policy sublayer --use_cpu_offload",
    "--use_gradient_checkpointing false --sharding_strategy shard_grad_op --gradient_accumulation_steps 2"
    " --no_sync",
]


@on_cpus
@pytest.mark.parametrize(
    ("train_type", "options"),
    products(
        ["bnb_dora", "full"],
        OPTIONS,
        always=[("bnb_dora", OPTIONS[2]), ("full", OPTIONS[1])],
        left_out=[OPTIONS[0]],  # OPTIONS[1] has its checkpointing
    ),
)
def test_fsdp_trains_the_same_with_them(train_type, options, checkpoints, short_rows, two_ranks, tmp_path):
    """Bit for bit, as the sum of two ranks has no order; with few buffers."""
    args = [*arguments(checkpoints(), short_rows, train_type), "--batch_size", "2", *options.split()]
    expected = two_ranks(train_run, args)[0]
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        got, (gathered, summed) = two_ranks(run_with_files, folder, args)[0]
    assert got[0] == expected[0]
    assert got[2] == expected[2]
    for name, tensor in expected[1].items():
        assert torch.equal(got[1][name], tensor), name
    assert 0 < gathered <= 6
    assert 0 < summed <= 2


@pytest.mark.slow
@on_cpus
def test_groups_of_ranks_have_buffers_of_their_own(checkpoints, short_rows, four_ranks, tmp_path):
    hybrid = "--batch_size 1 --sharding_strategy hybrid_full_shard --hybrid_shard_size 2".split()
    args = [*arguments(checkpoints(), short_rows, "bnb_dora"), *hybrid]
    expected = four_ranks(train_run, args)[0]
    assert_same(expected, four_ranks(run_with_files, str(tmp_path), args)[0][0])


def test_sums_too_large_for_a_buffer_use_the_group(monkeypatch):
    taken = []
    monkeypatch.setattr(Buffers, "acquire", lambda *_: taken.append(1))
    monkeypatch.setattr(copy_engines, "MAX_SUMMED_BYTES", 8)
    calls = []
    monkeypatch.setattr(copy_engines, "reduce_scatter", lambda out, given, **kwargs: calls.append(kwargs))
    CopiedReduceScatter(Buffers(None))(torch.empty(2), torch.empty(4), None, dist.ReduceOp.SUM)
    assert calls == [{"op": dist.ReduceOp.SUM, "group": None}]
    assert not taken


def test_operations_other_than_sums_are_refused():
    with pytest.raises(AssertionError):
        CopiedReduceScatter(Buffers(None))(torch.empty(2), torch.empty(4), None, dist.ReduceOp.AVG)


def without_gpus(rank_info) -> bool:
    return make_copy_collectives(init_device_mesh("cpu", (rank_info.world,))) is None


@on_cpus
def test_there_are_none_without_gpus(two_ranks):
    assert all(two_ranks(without_gpus))


# On GPUs


def compare_on_gpus(rank_info) -> int:
    mesh = init_device_mesh("cuda", (rank_info.world,))
    copies = make_copy_collectives(mesh)
    assert copies is not None and make_copy_collectives(mesh) is copies
    for _ in range(50):
        compare(rank_info.device, copies, mesh.get_group())
    before = torch.cuda.memory_allocated()
    compare(rank_info.device, copies, mesh.get_group())
    return torch.cuda.memory_allocated() - before


@pytest.mark.two_gpus
def test_results_equal_nccls(two_ranks):
    assert two_ranks(compare_on_gpus) == [0, 0]  # buffers are reused


def with_nccl(rank_info, args) -> tuple:
    return run_with(lambda mesh: None, rank_info, args)


@pytest.mark.two_gpus
@pytest.mark.parametrize(
    "options", ["", "--wrap_policy sublayer --use_cpu_offload", "--sharding_strategy shard_grad_op"]
)
@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_two_gpus_train_as_with_nccl(train_type, options, checkpoints, short_rows, two_ranks):
    args = [
        *arguments(checkpoints(), short_rows, train_type),
        "--batch_size",
        "2",
        "--deterministic",
        *options.split(),
    ]
    expected, got = two_ranks(with_nccl, args)[0], two_ranks(train_run, args)[0]
    assert got[0] == expected[0]
    for name, tensor in expected[1].items():
        assert torch.equal(got[1][name], tensor), name


def try_with(rank_info, stage: str, replacement) -> bool:
    """Whether copies are made in a new group, with a stage of the trial replaced on rank 1."""
    group = dist.new_group(list(range(rank_info.world)))
    mesh = DeviceMesh.from_group(group, "cuda")
    with mock.patch.object(Trial, stage, replacement) if rank_info.rank == 1 else contextlib.nullcontext():
        return make_copy_collectives(mesh) is not None


def without_access(trial) -> bool:
    with mock.patch.object(torch.cuda, "can_device_access_peer", lambda *_: False):
        return REACH(trial)


def misread(trial) -> bool:
    for buffers in trial.gathered, trial.summed:
        buffer = buffers.all[0]
        buffer.parts = [p if r == buffer.rank else torch.zeros_like(p) for r, p in enumerate(buffer.parts)]
    return EXCHANGE(trial)


def forbidden(trial) -> bool:
    raise RuntimeError("by a container")


REACH, EXCHANGE = Trial.check_peer_access, Trial.matches_nccl


@pytest.mark.two_gpus
@pytest.mark.parametrize(
    ("stage", "replacement"),
    [("check_peer_access", without_access), ("allocate", forbidden), ("matches_nccl", misread)],
)
def test_if_one_rank_fails_all_use_nccl(stage, replacement, two_ranks):
    assert two_ranks(try_with, stage, replacement) == [False, False]


STAGES = "list_gpus", "check_peer_access", "allocate", "map", "matches_nccl"


def entered_stages(rank_info, failing: str, how: str) -> tuple[list[str], bool]:
    """(the stages that this rank enters, whether copies are made), if rank 1 fails in one.

    All other stages are collective.
    """
    entered = []

    def stage(trial, name: str) -> bool:
        entered.append(name)
        if name == failing and rank_info.rank == 1:
            if how == "raises":
                raise RuntimeError
            return False
        if name != failing:
            dist.barrier()
        return True

    trial = type(
        "", (), {name: functools.partialmethod(stage, name) for name in STAGES} | {"copies": "copies"}
    )
    with mock.patch.object(copy_engines, "Trial", lambda group: trial()):
        return entered, copy_engines._try_copies.__wrapped__(dist.group.WORLD) is not None


@on_cpus
@pytest.mark.parametrize("how", ["raises", "returns"])
@pytest.mark.parametrize("failing", [*STAGES, "none"])
def test_ranks_leave_the_trial_together(failing, how, two_ranks):
    entered = list(STAGES) if failing == "none" else list(STAGES[: STAGES.index(failing) + 1])
    assert two_ranks(entered_stages, failing, how) == [(entered, failing == "none")] * 2


class SingleBuffer:
    """A Buffer of one rank."""

    def __init__(self, n_ranks: int, n_bytes: int, device: torch.device):
        self.n_bytes, self.rank, self.user = n_bytes, 0, lambda: None
        self.parts = [torch.empty(n_bytes, dtype=torch.uint8)]

    def map(self, group) -> None: ...


def test_a_layer_is_not_gathered_in_the_heads_buffer():
    """Otherwise the head would make a second one, and two of that size would remain."""

    def acquire(n: int):
        return buffers.acquire((n,), torch.uint8, torch.device("cpu"))[1]

    buffers = Buffers(mock.Mock(size=lambda: 1), SingleBuffer, copy_engines.MAX_WASTE)
    head = acquire(1000)
    del head
    first, second = acquire(400), acquire(450)
    head = acquire(1000)
    assert [b.n_bytes for b in buffers.all] == [1000, 400, 450]
    del first, second
    layers = [acquire(420), acquire(300)]
    assert [b.n_bytes for b in buffers.all] == [1000, 400, 450]
    assert [buffers.buffer_of(tensor).n_bytes for tensor in (*layers, head)] == [450, 400, 1000]


class PendingEvent:
    def query(self) -> bool:
        return False


def test_an_event_that_never_comes_is_an_error_line(monkeypatch):
    monkeypatch.setattr(copy_engines, "TIMEOUT_SECONDS", 0.01)
    with pytest.raises(UserError, match="NCCL_P2P_DISABLE=1"):
        copy_engines._wait_for_event(PendingEvent())


def name_with_p2p_disabled(rank_info) -> bool:
    with mock.patch.dict(os.environ, NCCL_P2P_DISABLE="1"):
        return Trial(dist.group.WORLD).list_gpus()


@pytest.mark.two_gpus
def test_p2p_disabled_forbids_access(two_ranks):
    assert two_ranks(name_with_p2p_disabled) == [False, False]
