"""All-gathers and reduce-scatters by copy engines. What FSDP2 does with them is shown without GPUs as well, in buffers
that files stand for; the engines' own part on two GPUs."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import copy_engines
import wrapping
from config import UserError
from copy_engines import Buffers, CopiedAllGather, CopiedReduceScatter, make_copies
from loss import all_gather, ranks_of_a_copy, reduce_scatter
from tests.runs import train_run
from tests.test_parity import arguments, assert_same

CASES = [  # elements of a rank, dtype: buffers are made, met again, and too small
    (1000, torch.float32),
    (1000, torch.float32),
    (24, torch.bfloat16),
    (4096, torch.uint8),
    (3, torch.float16),
]

on_cpus = pytest.mark.skipif(torch.cuda.is_available(), reason="of ranks on CPUs")


class Files:
    """A Buffer on a CPU: every rank's part is a file that all map."""

    def __init__(self, folder: Path, group: dist.ProcessGroup, n: int, device: torch.device):
        self.group, self.rank, self.n, self.taken = group, group.rank(), n, lambda: None
        number, size = len(list(folder.glob(f"*-{self.rank}"))), max(n, 1)
        dist.barrier(group)
        paths = [folder / f"{number}-{rank}" for rank in range(group.size())]
        paths[self.rank].write_bytes(bytes(size))
        dist.barrier(group)
        self.parts = [torch.from_file(str(p), shared=True, size=size, dtype=torch.uint8)[:n] for p in paths]

    others = copy_engines.Buffer.others

    def meet(self) -> None:
        dist.barrier(self.group)


def made_of_files(folder: Path, mesh, used: list | None = None):
    """As `make_copies`."""
    shards = ranks_of_a_copy(mesh)
    if shards.size() == 1:
        return None
    group = shards.get_group()
    own = folder / str(dist.get_process_group_ranks(group)[0])
    places = [own / "gathered", own / "summed"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    gathered, summed = (Buffers(group, functools.partial(Files, place)) for place in places)
    if used is not None:
        used += [gathered, summed]
    return CopiedAllGather(gathered), CopiedReduceScatter(summed)


def compare(device: torch.device, copies, group: dist.ProcessGroup) -> None:
    gather, scatter = copies
    rank, world = group.rank(), group.size()
    generator = torch.Generator().manual_seed(rank)
    for n, dtype in [*CASES, *CASES]:
        given = torch.randint(64, (world, n), generator=generator).to(device, dtype)
        expected = torch.empty_like(given).flatten()
        all_gather(expected, given[rank].clone(), group=group)
        whole = gather.allocate((world * n,), dtype=dtype, device=device)
        part = whole[rank * n : (rank + 1) * n]
        part.copy_(given[rank])
        assert gather(whole, part, group) is None
        assert torch.equal(whole, expected)
        if dtype == torch.float32:
            expected, result = torch.empty_like(given[0]), torch.empty_like(given[0])
            reduce_scatter(expected, given.flatten(), group=group)
            scatter(result, given.flatten(), group, dist.ReduceOp.SUM)
            assert torch.equal(result, expected)


def compare_files(place, folder: str) -> None:
    mesh = init_device_mesh("cpu", (place.world,))
    compare(place.device, made_of_files(Path(folder), mesh), mesh.get_group())


@on_cpus
@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
def test_every_rank_has_what_the_others_had(pool, request, tmp_path):
    request.getfixturevalue(pool)(compare_files, str(tmp_path))


def run_with(make, place, args: list) -> tuple:
    """train_run's, with another `make_copies`."""
    original, wrapping.make_copies = wrapping.make_copies, make
    try:
        return train_run(place, args)
    finally:
        wrapping.make_copies = original


def run_with_files(place, folder: str, args: list) -> tuple:
    """(train_run's, how many buffers it took)."""
    used: list[Buffers] = []
    result = run_with(lambda mesh: made_of_files(Path(folder), mesh, used), place, args)
    return result, [len(buffers.all) for buffers in used]


@on_cpus
@pytest.mark.parametrize(
    "options",
    [
        "--use_gradient_checkpointing true",
        "--use_gradient_checkpointing true --wrap_policy sublayer --use_cpu_offload",
        "--use_gradient_checkpointing false --sharding_strategy shard_grad_op --gradient_accumulation_steps 2 --no_sync",
    ],
)
@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_fsdp_trains_the_same_with_them(train_type, options, checkpoints, alpaca_file, two_ranks, tmp_path):
    """To the last bit, as two ranks' sums have no order; in few buffers."""
    args = [*arguments(checkpoints(), alpaca_file, train_type), "--batch_size", "2", *options.split()]
    expected = two_ranks(train_run, args)[0]
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        got, (gathered, summed) = two_ranks(run_with_files, folder, args)[0]
    assert got[0] == expected[0]
    assert got[2] == expected[2]
    for name, tensor in expected[1].items():
        assert torch.equal(got[1][name], tensor), name
    assert 0 < gathered <= 6
    assert 0 < summed <= 2


@on_cpus
def test_groups_of_ranks_have_buffers_of_their_own(checkpoints, alpaca_file, four_ranks, tmp_path):
    hybrid = "--batch_size 1 --sharding_strategy hybrid_full_shard --hybrid_shard_size 2".split()
    args = [*arguments(checkpoints(), alpaca_file, "bnb_dora"), *hybrid]
    expected = four_ranks(train_run, args)[0]
    assert_same(expected, four_ranks(run_with_files, str(tmp_path), args)[0][0])


def test_sums_too_large_to_hold_are_left_to_the_group(monkeypatch):
    taken = []
    monkeypatch.setattr(Buffers, "take", lambda *_: taken.append(1))
    monkeypatch.setattr(copy_engines, "MOST_SUMMED", 8)
    asked = []
    monkeypatch.setattr(copy_engines, "reduce_scatter", lambda out, given, **how: asked.append(how))
    CopiedReduceScatter(Buffers(None))(torch.empty(2), torch.empty(4), None, dist.ReduceOp.SUM)
    assert asked == [{"op": dist.ReduceOp.SUM, "group": None}]
    assert not taken


def test_another_operation_than_a_sum_is_none_of_ours():
    with pytest.raises(AssertionError):
        CopiedReduceScatter(Buffers(None))(torch.empty(2), torch.empty(4), None, dist.ReduceOp.AVG)


def without_gpus(place) -> bool:
    return make_copies(init_device_mesh("cpu", (place.world,))) is None


@on_cpus
def test_there_are_none_without_gpus(two_ranks):
    assert all(two_ranks(without_gpus))


# On GPUs


def compare_on_gpus(place) -> int:
    mesh = init_device_mesh("cuda", (place.world,))
    copies = make_copies(mesh)
    assert copies is not None and make_copies(mesh) is copies
    for _ in range(50):
        compare(place.device, copies, mesh.get_group())
    before = torch.cuda.memory_allocated()
    compare(place.device, copies, mesh.get_group())
    return torch.cuda.memory_allocated() - before


@pytest.mark.two_gpus
def test_gpus_fetch_what_nccl_brings(two_ranks):
    assert two_ranks(compare_on_gpus) == [0, 0]  # no buffer is made that is there


def with_nccl(place, args) -> tuple:
    return run_with(lambda mesh: None, place, args)


@pytest.mark.two_gpus
@pytest.mark.parametrize(
    "options", ["", "--wrap_policy sublayer --use_cpu_offload", "--sharding_strategy shard_grad_op"]
)
@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_two_gpus_train_as_with_nccl(train_type, options, checkpoints, alpaca_file, two_ranks):
    args = [
        *arguments(checkpoints(), alpaca_file, train_type),
        "--batch_size",
        "2",
        "--deterministic",
        *options.split(),
    ]
    expected, got = two_ranks(with_nccl, args)[0], two_ranks(train_run, args)[0]
    assert got[0] == expected[0]
    for name, tensor in expected[1].items():
        assert torch.equal(got[1][name], tensor), name


def tried(place, name: str, replaced) -> bool:
    """Whether copies are made, of a group of its own, where a name of copy_engines is something else on rank 1."""
    group = dist.new_group(list(range(place.world)))
    mesh = DeviceMesh.from_group(group, "cuda")
    original = getattr(copy_engines, name)
    if place.rank == 1:
        setattr(copy_engines, name, replaced)
    try:
        return make_copies(mesh) is not None
    finally:
        setattr(copy_engines, name, original)


def unreached(group) -> bool:
    original = torch.cuda.can_device_access_peer
    torch.cuda.can_device_access_peer = lambda *_: False
    try:
        return REACH(group)
    finally:
        torch.cuda.can_device_access_peer = original


def misread(gather, scatter, group) -> bool:
    buffers = gather.buffers.make
    gather.buffers.make = lambda *a: spoilt(buffers(*a))
    return WORK(gather, scatter, group)


def spoilt(buffer):
    buffer.parts = [p if r == buffer.rank else torch.zeros_like(p) for r, p in enumerate(buffer.parts)]
    return buffer


REACH, WORK = copy_engines._reach_each_other, copy_engines._work


@pytest.mark.two_gpus
@pytest.mark.parametrize(("name", "replaced"), [("_reach_each_other", unreached), ("_work", misread)])
def test_one_rank_that_cannot_leaves_all_to_nccl(name, replaced, two_ranks):
    assert two_ranks(tried, name, replaced) == [False, False]


class Never:
    def query(self) -> bool:
        return False


def test_what_never_comes_is_a_line(monkeypatch):
    monkeypatch.setattr(copy_engines, "PATIENCE_SECONDS", 0.01)
    with pytest.raises(UserError, match="NCCL_P2P_DISABLE=1"):
        copy_engines._await(Never())


def told_otherwise(place) -> bool:
    os.environ["NCCL_P2P_DISABLE"] = "1"
    try:
        return copy_engines._reach_each_other(dist.group.WORLD)
    finally:
        del os.environ["NCCL_P2P_DISABLE"]


@pytest.mark.two_gpus
def test_nccls_setting_holds_for_them(two_ranks):
    assert two_ranks(told_otherwise) == [False, False]
