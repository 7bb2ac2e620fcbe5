"""The optimizers, against torch's and bitsandbytes' own on full plain tensors, and the schedule."""

from __future__ import annotations

import dataclasses
import io
import warnings
from functools import partial
from itertools import pairwise
from unittest import mock

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import train
from models.family import unwrapped_name
from options.config import FIELDS
from options.errors import UserError
from options.train import parse
from parallel.optimizers import (
    OPTIMIZERS,
    check_optimizer,
    lr_factor,
    make_optimizer,
    make_schedule,
    merge_8bit_states,
)
from tests.helpers.adapters import build_meta_model
from tests.helpers.runs import train_run

FUSED = {"fused_adamw": torch.optim.AdamW, "fused_adam": torch.optim.Adam}
BITSANDBYTES = {
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
    "paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit,
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
}
# Two ranks split no 256-element block, and a shard has 4,096 elements or more where the full tensor has: both
# have the same 8-bit blocks. Rank 1 has one of 3 rows, and nothing of 1 row or of 1 element.
SHAPES = [(64, 128), (3, 4096), (1, 4096), (8, 64), (512,), (1,)]
LR, DECAY, STEPS, RATIO = 1e-2, 0.1, 6, 4.0


def values(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Parameters (step 0) or the gradients of a step, of very different magnitudes."""
    generator = torch.Generator().manual_seed(step)
    sizes = [10.0 ** -(i % 3) for i in range(len(SHAPES))]
    return [
        ((torch.randn(shape, generator=generator) + 0.2) * size).to(dtype)
        for shape, size in zip(SHAPES, sizes, strict=True)
    ]


def run_steps(optimizer, params, steps, shard=lambda t: t, dtype=torch.float32) -> None:
    """Take steps with the gradients of `values`, under a schedule that ends at a tenth of the rate."""
    schedule = make_schedule(optimizer, STEPS, 0.3, "cosine")
    for step in range(1, STEPS + 1):
        if step in steps:
            for p, gradient in zip(params, values(step, dtype), strict=True):
                p.grad = shard(gradient)
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()


def run_plain(kind, steps=range(1, STEPS + 1), dtype=torch.float32, **options) -> list[torch.Tensor]:
    """Full tensors after steps of another library's optimizer, with the groups written out."""
    params = [nn.Parameter(v) for v in values(0, dtype)]
    groups = [{"params": params[:4], "weight_decay": DECAY}, {"params": params[4:], "weight_decay": 0.0}]
    run_steps(kind(groups, lr=LR, **options), params, steps, dtype=dtype)
    return [p.detach() for p in params]


def make_shard(rank_info):
    """shard(tensor) -> the DTensor of it."""
    mesh = init_device_mesh("cpu", (rank_info.world,))
    return lambda t: distribute_tensor(t, mesh, [Shard(0)])


def run_sharded(rank_info, name: str, dtype: torch.dtype = torch.float32):
    """(full tensors after STEPS steps over DTensors, dtypes of this rank's state)."""
    shard = make_shard(rank_info)
    params = [nn.Parameter(shard(v)) for v in values(0, dtype)]
    optimizer = make_optimizer(params, name, LR, DECAY)
    run_steps(optimizer, params, range(1, STEPS + 1), shard, dtype)
    states = [{k: v.dtype for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for p in params]
    return [p.detach().full_tensor() for p in params], states


@pytest.mark.parametrize("name", FUSED)
def test_fused_is_unfused(name, one_rank, two_ranks):
    expected, before = run_plain(FUSED[name], fused=False, foreach=False), values(0)
    for ranks in (one_rank, two_ranks):
        for got, _ in ranks(run_sharded, name):
            for a, b, start in zip(got, expected, before, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
                assert (a - start).norm() > 1e-3, "the parameter did not move"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_sharded_is_bitsandbytes_own(name, dtype, one_rank, two_ranks):
    expected, before = run_plain(BITSANDBYTES[name], dtype=dtype), values(0, dtype)
    for ranks in (one_rank, two_ranks):
        for got, _ in ranks(run_sharded, name, dtype):
            for a, b, start in zip(got, expected, before, strict=True):
                assert torch.equal(a, b) and not torch.equal(a, start)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_sharded_follows_torch(name, two_ranks):
    """32-bit moments to rounding; 8-bit ones within 3% of the parameters' change."""
    expected, before = run_plain(torch.optim.AdamW), values(0)
    got, states = two_ranks(run_sharded, name)[0]
    for a, b, start, state in zip(got, expected, before, states, strict=True):
        is_8bit = name.endswith("8bit") and a.numel() >= 4096
        assert state["state1"] == state["state2"] == (torch.uint8 if is_8bit else torch.float32)
        error = (a - b).norm() / (b - start).norm()
        assert (1e-5 < error < 0.03) if is_8bit else error < 1e-5


def run_lora_plus(rank_info, name: str):
    """(full tensors after STEPS steps over DTensors, of which two are B of LoRA+; the groups)."""
    shard = make_shard(rank_info)
    params = [nn.Parameter(shard(v)) for v in values(0)]
    optimizer = make_optimizer(params, name, LR, DECAY, [params[1], params[3]], RATIO)
    groups = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    run_steps(optimizer, params, range(1, STEPS + 1), shard)
    return [p.detach().full_tensor() for p in params], groups


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), *BITSANDBYTES.items()])
def test_lora_plus_has_groups_of_their_own_rate(name, kind, two_ranks):
    """The first group has --lr, which metrics.jsonl shows. Without a ratio there are two groups, as ever."""
    params = [nn.Parameter(v) for v in values(0)]
    groups = [
        {"params": [params[0], params[2]], "weight_decay": DECAY},
        {"params": [params[1], params[3]], "weight_decay": DECAY, "lr": RATIO * LR},
        {"params": params[4:], "weight_decay": 0.0, "lr": RATIO * LR},
    ]
    run_steps(kind(groups, lr=LR), params, range(1, STEPS + 1))
    for got, found in two_ranks(run_lora_plus, name):
        assert found == [(2, LR, DECAY), (2, RATIO * LR, DECAY), (2, RATIO * LR, 0.0)]
        torch.testing.assert_close(got, [p.detach() for p in params], rtol=1e-6, atol=1e-6)
    plain = make_optimizer(params, name, LR, DECAY, params[1:4:2])
    assert [(len(g["params"]), g["lr"]) for g in plain.param_groups] == [(4, LR), (2, LR)]


def test_a_rank_without_rows_keeps_no_state(two_ranks):
    states = [states for _, states in two_ranks(run_sharded, "adamw_8bit")]
    assert [bool(s) for s in states[0]] == [True] * 6
    assert [bool(s) for s in states[1]] == [True, True, False, True, True, False]


def run_uneven_unit(rank_info, name: str) -> torch.Tensor:
    """The weight of an FSDP unit of 3 rows after 4 steps.

    Its weight is replaced before the optimizer is made. At the first forward, FSDP pads the shard of the rank
    with one row, in new memory again.
    """
    torch.manual_seed(0)
    unit = nn.Linear(4096, 3, bias=False)
    fully_shard(unit, mesh=init_device_mesh("cpu", (rank_info.world,)))
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)
    unit.weight = nn.Parameter(unit.weight.detach().clone())
    optimizer, before = make_optimizer(unit.parameters(), name, LR, DECAY), unit.weight.to_local().data_ptr()
    for x in torch.randn(4, 4096, generator=torch.Generator().manual_seed(1)):
        (unit(x).square().sum() / rank_info.world).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (unit.weight.to_local().data_ptr() != before) == (rank_info.rank == 1), "FSDP does not pad now"
    return unit.weight.detach().full_tensor()


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit"])
def test_updates_reach_the_weights_that_fsdp_gathers(name, two_ranks):
    torch.manual_seed(0)
    layer = nn.Linear(4096, 3, bias=False)
    optimizer = BITSANDBYTES[name](layer.parameters(), lr=LR, weight_decay=DECAY)
    for x in torch.randn(4, 4096, generator=torch.Generator().manual_seed(1)):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for got in two_ranks(run_uneven_unit, name):
        torch.testing.assert_close(got, layer.weight.detach(), rtol=0, atol=1e-6)


def run_resumed(rank_info, name: str) -> list[torch.Tensor]:
    """Take three steps, save and load the state, take three more with a new optimizer over new parameters."""
    shard, file = make_shard(rank_info), io.BytesIO()
    params = [nn.Parameter(shard(v)) for v in values(0)]
    optimizer = make_optimizer(params, name, LR, DECAY)
    run_steps(optimizer, params, range(1, 4), shard)
    saved = optimizer.state_dict()
    assert [g["params"] for g in saved["param_groups"]] == [[0, 1, 2, 3], [4, 5]]  # as in torch's
    torch.save(saved, file)
    params = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = make_optimizer(params, name, 7 * LR, 0.5)  # the rate and the decay are in the state
    optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    run_steps(optimizer, params, range(4, STEPS + 1), shard)
    return [p.detach().full_tensor() for p in params]


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_state_is_saved_and_loaded(name, two_ranks):
    expected = run_plain(BITSANDBYTES[name])
    for got in two_ranks(run_resumed, name):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def after_one_step(shape, name: str = "adamw_8bit"):
    """An optimizer of one parameter, after one step."""
    p = nn.Parameter(torch.ones(shape))
    optimizer = make_optimizer([p], name, LR, 0.0)
    p.grad = torch.ones(shape)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "shape, name", [((32, 128), "adamw_8bit"), ((64, 128), "paged_adamw_32bit"), ((64, 128), "adamw")]
)
def test_state_of_other_shards_or_optimizers_is_refused(shape, name):
    optimizer = after_one_step((64, 128))
    with pytest.raises(ValueError, match="other shards or of another optimizer"):
        optimizer.load_state_dict(after_one_step(shape, name).state_dict())
    two = make_optimizer([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))], "adamw_8bit", LR, 0.0)
    with pytest.raises(ValueError, match="other parameter groups"):
        optimizer.load_state_dict(two.state_dict())


def quantize_moments(moments: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """bitsandbytes' state tensors of two moments."""
    state = {}
    for key, moment in zip("12", moments, strict=True):
        state[f"state{key}"] = moment
        if moment.numel() >= 4096:
            state[f"qmap{key}"] = table = functional.create_dynamic_map(signed=key == "1")
            state[f"state{key}"], blocks = functional.quantize_blockwise(moment, table, blocksize=256)
            state[f"absmax{key}"] = blocks.absmax
    return state


@pytest.mark.parametrize("rows, is_8bit", [(slice(1, 60), True), (slice(40, 50), False)])
def test_8_bit_moments_of_other_rows(rows, is_8bit):
    """Rows of very different magnitudes, from a shard of 48 rows in 8 bits and from one of 16 in 32 bits."""
    first = torch.randn(64, 100) * torch.logspace(-2, 0, 64)[:, None]
    moments = [first, first.square()]
    parts = [
        (quantize_moments([m[:48] for m in moments]), slice(rows.start, 48)),
        (quantize_moments([m[48:] for m in moments]), slice(0, rows.stop - 48)),
    ]
    merged = merge_8bit_states(parts)
    names = ("state", "absmax", "qmap") if is_8bit else ("state",)
    assert set(merged) == {f"{name}{i}" for name in names for i in "12"}
    for key, moment in zip("12", moments, strict=True):
        got = merged[f"state{key}"]
        assert got.dtype == (torch.uint8 if is_8bit else torch.float32) and got.shape == moment[rows].shape
        if is_8bit:
            scales = {"absmax": merged[f"absmax{key}"], "code": merged[f"qmap{key}"]}
            got = functional.dequantize_blockwise(got, **scales, blocksize=256)
        assert 1e-3 < (got - moment[rows]).norm() / moment[rows].norm() < 0.02


def test_8_bit_moments_of_the_same_rows_are_unchanged():
    state = quantize_moments([torch.randn(64, 100), torch.rand(64, 100)])
    assert merge_8bit_states([(state, slice(0, 64))]) is state


def test_state_before_the_first_step_is_saved_and_loaded():
    fresh = make_optimizer([nn.Parameter(torch.ones(64, 128))], "adamw_8bit", LR, 0.0)
    fresh.load_state_dict(fresh.state_dict())
    used = after_one_step((64, 128))
    used.load_state_dict(fresh.state_dict())
    assert used.state_dict()["state"] == {0: {}}


def run_scaled(rank_info, name: str, scale: float) -> torch.Tensor:
    """A parameter after three steps under torch's gradient scaler; the second overflows and is skipped."""
    shard = make_shard(rank_info)
    p = nn.Parameter(shard(values(0)[0]))
    optimizer = make_optimizer([p], name, LR, DECAY)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        loss = scaler.scale(torch.tensor(factor))
        p.grad = shard(values(step + 1)[0] * loss)
        scaler.unscale_(optimizer)  # finds the gradients through param_groups
        scaler.step(optimizer)
        scaler.update(scale)
        optimizer.zero_grad()
    assert optimizer.state[p]["step"] == 2
    return p.detach().full_tensor()


@pytest.mark.parametrize("name", [*FUSED, *BITSANDBYTES])
def test_gradient_scaler(name, two_ranks):
    for a, b in zip(two_ranks(run_scaled, name, 1.0), two_ranks(run_scaled, name, 1024.0), strict=True):
        assert torch.equal(a, b)  # a power of two changes no bit
        assert (a - values(0)[0]).norm() > 0.01


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_paging_does_not_warn_on_a_cpu(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert after_one_step((400, 256), name).state_dict()["state"][0]["step"] == 1


# Weight decay


def groups_by_name(model, name: str) -> tuple[set[str], set[str]]:
    """(names that decay, names that do not)."""
    optimizer = make_optimizer(model.parameters(), name, LR, DECAY)
    names = {p: unwrapped_name(n) for n, p in model.named_parameters()}
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, DECAY}
    found = [(names[p], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert len(found) == len(set(found)) == sum(p.requires_grad for p in model.parameters())
    return {n for n, wd in found if wd}, {n for n, wd in found if not wd}


@pytest.mark.parametrize("name", ["adamw", "fused_adamw", "adamw_8bit"])
def test_norms_biases_and_magnitudes_never_decay(name, checkpoints):
    decayed, excluded = groups_by_name(build_meta_model(checkpoints("llama_bias"), "bnb_dora"), name)
    assert {n.split(".")[-1] for n in decayed} == {"lora_A", "lora_B"}
    assert {n.split(".")[-1] for n in excluded} == {"magnitude_change"}

    full = build_meta_model(checkpoints("llama_bias"), "full")
    decayed, excluded = groups_by_name(full, name)
    assert {n.split(".")[-1] for n in decayed} == {"weight"} and not any("norm" in n for n in decayed)
    assert {n.split(".")[-1] for n in excluded} == {"weight", "bias"}
    assert all("norm" in n.split(".")[-2] for n in excluded if n.endswith(".weight"))
    assert sum(n.endswith("layernorm.weight") for n in excluded) == 6 and "model.norm.weight" in excluded

    expanded = build_meta_model(checkpoints("llama_bias_pro"), "bnb_llama_pro")
    decayed, excluded = groups_by_name(expanded, name)
    blocks = [f"model.layers.{i}." for i in expanded.config.llama_pro_new_layers]
    assert {n for n in excluded if "bias" not in n} == {
        f"{block}{norm}.weight"
        for block in blocks
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    assert len(decayed) == 7 * len(blocks) and all(n.startswith(tuple(blocks)) for n in decayed | excluded)


def test_the_table_has_every_choice_of_the_option():
    assert set(OPTIMIZERS) == set(FIELDS["optimizer"].metadata["choices"])


# Whole runs


def run_args(model, data, name: str) -> list:
    common = "--train_type full --lr 1e-3 --wd 0.1 --max_steps 4 --lr_scheduler linear --batch_size 2".split()
    return ["--model_name", model, "--dataset", data, *common, "--optimizer", name]


def plain_loop_run(rank_info, argv: list):
    """`train_run` with torch's optimizers that loop over parameters."""
    plain = {
        "adam": partial(torch.optim.Adam, fused=False, foreach=False),
        "adamw": partial(torch.optim.AdamW, fused=False, foreach=False),
    }
    with mock.patch.dict(OPTIMIZERS, plain):
        return train_run(rank_info, argv)


# fused_adam is another name of adam, and fused_adamw of adamw.
@pytest.mark.parametrize(
    "like, names",
    [("adam", []), ("adamw", BITSANDBYTES)],
    ids=["adam", "adamw"],
)
def test_runs_in_two_ranks_follow_torch(like, names, checkpoints, short_rows, two_ranks):
    expected = two_ranks(plain_loop_run, run_args(checkpoints(), short_rows, like))[0]
    for name in [like, *names]:
        losses, tensors, norms = two_ranks(train_run, run_args(checkpoints(), short_rows, name))[0]
        tolerance = 5e-3 if name.endswith("8bit") else 1e-5
        for got, wanted in ((losses, expected[0]), (norms, expected[2])):
            torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=tolerance, atol=0)
        assert losses[-1] < 0.97 * losses[0] and tensors.keys() == expected[1].keys()


@pytest.mark.parametrize(
    "name, instead", [("paged_adamw_32bit", "adamw"), ("paged_adamw_8bit", "adamw_8bit")]
)
def test_paging_of_states_in_host_memory_is_refused(name, instead):
    with pytest.raises(UserError) as error:
        check_optimizer(name, cpu_offload=True)
    assert f"--optimizer {name} " in str(error.value) and "--use_cpu_offload" in str(error.value)
    assert f"use --optimizer {instead}," in str(error.value)
    check_optimizer(name, cpu_offload=False)
    check_optimizer(instead, cpu_offload=True)
    config, _ = parse(["--optimizer", name])
    with pytest.raises(UserError, match=f"--optimizer {name} has no effect"):
        train.check_run(dataclasses.replace(config, use_cpu_offload=True))


# The schedule


def factors(total: int, warmup: float, kind: str) -> list[float]:
    return [lr_factor(step, total, warmup, kind) for step in range(total)]


def test_warm_up_rises_to_the_peak_and_no_step_is_lost():
    assert factors(10, 0.4, "constant") == pytest.approx([0.25, 0.5, 0.75, 1] + [1] * 6)
    assert factors(4, 0.0, "constant") == [1] * 4


def test_linear_falls_towards_zero():
    assert factors(5, 0.0, "linear") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert factors(10, 0.2, "linear")[1:3] == pytest.approx([1, 1])


def test_cosine_falls_towards_a_tenth():
    values = factors(1000, 0.1, "cosine")
    assert (
        values[100] == 1 and values[550] == pytest.approx(0.55) and values[-1] == pytest.approx(0.1, abs=1e-4)
    )
    assert all(a >= b for a, b in pairwise(values[100:]))


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_short_runs_have_a_rate(total, kind, warmup):
    assert all(0 < f <= 1 for f in factors(total, warmup, kind))


def test_scheduler_applies_the_factor_from_the_first_step():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = make_optimizer([parameter], "sgd", lr=0.5, weight_decay=0.0)
    schedule, seen = make_schedule(optimizer, 4, 0.5, "linear"), []
    for _ in range(4):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.25, 0.5, 0.5, 0.25])
