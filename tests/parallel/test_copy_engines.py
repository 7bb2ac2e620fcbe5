"""All-gathers and reduce-scatters by copy engines. What FSDP2 does with them is shown without GPUs as well, in buffers
that files stand for; the engines' own part on two GPUs."""

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
from parallel.copy_engines import Buffers, CopiedAllGather, CopiedReduceScatter, Trial, make_copies
from tests.helpers.parity import arguments, assert_same
from tests.helpers.products import products
from tests.helpers.runs import train_run

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

    def __init__(self, folder: Path, world: int, n: int, device: torch.device):
        self.folder, self.n, self.taken = folder, n, lambda: None

    def map(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, folder, n = group, group.rank(), self.folder, self.n
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
    shards = shard_mesh(mesh)
    if shards.size() == 1:
        return None
    group = shards.get_group()
    own = folder / str(dist.get_process_group_ranks(group)[0])
    places = [own / "gathered", own / "summed"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    gathered, summed = (
        Buffers(group, functools.partial(Files, place), waste)
        for place, waste in zip(places, (copy_engines.WASTE, math.inf), strict=True)
    )
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


OPTIONS = [
    "--use_gradient_checkpointing true",
    "--use_gradient_checkpointing true --wrap_policy sublayer --use_cpu_offload",
    "--use_gradient_checkpointing false --sharding_strategy shard_grad_op --gradient_accumulation_steps 2 --no_sync",
]


@on_cpus
@pytest.mark.parametrize(
    ("train_type", "options"),
    products(
        ["bnb_dora", "full"],
        OPTIONS,
        always=[("bnb_dora", OPTIONS[0]), ("bnb_dora", OPTIONS[2]), ("full", OPTIONS[1])],
    ),
)
def test_fsdp_trains_the_same_with_them(train_type, options, checkpoints, short_rows, two_ranks, tmp_path):
    """To the last bit, as two ranks' sums have no order; in few buffers."""
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


def tried(place, stage: str, replaced) -> bool:
    """Whether copies are made, of a group of its own, where a stage of the trial is something else on rank 1."""
    group = dist.new_group(list(range(place.world)))
    mesh = DeviceMesh.from_group(group, "cuda")
    with mock.patch.object(Trial, stage, replaced) if place.rank == 1 else contextlib.nullcontext():
        return make_copies(mesh) is not None


def unreached(trial) -> bool:
    with mock.patch.object(torch.cuda, "can_device_access_peer", lambda *_: False):
        return REACH(trial)


def misread(trial) -> bool:
    for buffers in trial.gathered, trial.summed:
        buffer = buffers.all[0]
        buffer.parts = [p if r == buffer.rank else torch.zeros_like(p) for r, p in enumerate(buffer.parts)]
    return EXCHANGE(trial)


def forbidden(trial) -> bool:
    raise RuntimeError("by a container")


REACH, EXCHANGE = Trial.reach_each_other, Trial.exchange


@pytest.mark.two_gpus
@pytest.mark.parametrize(
    ("stage", "replaced"),
    [("reach_each_other", unreached), ("allocate", forbidden), ("exchange", misread)],
)
def test_one_rank_that_cannot_leaves_all_to_nccl(stage, replaced, two_ranks):
    assert two_ranks(tried, stage, replaced) == [False, False]


STAGES = "name", "reach_each_other", "allocate", "map", "exchange"


def come_to(place, failing: str, how: str) -> tuple[list[str], bool]:
    """(the stages that this rank comes to, whether copies are made), where rank 1 fails in one. All others are
    collective."""
    came = []

    def stage(trial, name: str) -> bool:
        came.append(name)
        if name == failing and place.rank == 1:
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
        return came, copy_engines._tried.__wrapped__(dist.group.WORLD) is not None


@on_cpus
@pytest.mark.parametrize("how", ["raises", "says so"])
@pytest.mark.parametrize("failing", [*STAGES, "none"])
def test_ranks_leave_the_trial_together(failing, how, two_ranks):
    came = list(STAGES) if failing == "none" else list(STAGES[: STAGES.index(failing) + 1])
    assert two_ranks(come_to, failing, how) == [(came, failing == "none")] * 2


class Mapped:
    """A Buffer of one rank."""

    def __init__(self, world: int, n: int, device: torch.device):
        self.n, self.rank, self.taken, self.parts = n, 0, lambda: None, [torch.empty(n, dtype=torch.uint8)]

    def map(self, group) -> None: ...


def test_a_layer_is_not_gathered_in_the_heads_buffer():
    """The head would take a second one then, and there would be two as large for good."""

    def take(n: int):
        return buffers.take((n,), torch.uint8, torch.device("cpu"))[1]

    buffers = Buffers(mock.Mock(size=lambda: 1), Mapped, copy_engines.WASTE)
    head = take(1000)
    del head
    first, second = take(400), take(450)
    head = take(1000)
    assert [b.n for b in buffers.all] == [1000, 400, 450]
    del first, second
    kept = [take(420), take(300)]
    assert [b.n for b in buffers.all] == [1000, 400, 450]
    assert buffers.of(kept[0]).n == 450 and buffers.of(kept[1]).n == 400 and buffers.of(head).n == 1000


class Never:
    def query(self) -> bool:
        return False


def test_what_never_comes_is_a_line(monkeypatch):
    monkeypatch.setattr(copy_engines, "PATIENCE_SECONDS", 0.01)
    with pytest.raises(UserError, match="NCCL_P2P_DISABLE=1"):
        copy_engines._await(Never())


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("NCCL_P2P_DISABLE", "1", True),
        ("NCCL_P2P_DISABLE", "0", False),
        ("NCCL_P2P_LEVEL", "LOC", True),
        ("NCCL_P2P_LEVEL", "0", True),
        ("NCCL_P2P_LEVEL", "NVL", True),
        ("NCCL_P2P_LEVEL", "SYS", False),
    ],
)
def test_nccls_settings_hold_for_them(variable, value, expected, monkeypatch):
    for name in ("NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    assert not copy_engines._forbidden()
    monkeypatch.setenv(variable, value)
    assert copy_engines._forbidden() is expected


def told_otherwise(place) -> bool:
    with mock.patch.dict(os.environ, NCCL_P2P_DISABLE="1"):
        return Trial(dist.group.WORLD).name()


@pytest.mark.two_gpus
def test_a_rank_that_is_told_otherwise_does_not_reach_others(two_ranks):
    assert two_ranks(told_otherwise) == [False, False]
