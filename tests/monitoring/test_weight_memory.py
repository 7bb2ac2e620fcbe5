"""The computed bytes of the weights, and their check after every load."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import train
from launch import memory
from monitoring.sizes import WeightBytes
from monitoring.weight_memory import (
    ROUNDING_PER_TENSOR,
    ExpectedMemory,
    PlannedParameter,
    check_loaded,
)
from options.methods import METHODS
from tests.helpers.bnb_checkpoints import pack_like_the_hub
from tests.helpers.parity import arguments, biased_checkpoint
from tests.helpers.products import slow
from tests.helpers.runs import make_job

H, M, V, LAYERS, R = 64, 160, 300, 3, 8  # tests/helpers/tiny.py's Llama; rank of `arguments`
WEIGHTS = LAYERS * (2 * H * H + 2 * H * (H // 2) + 3 * H * M)
DENSE = 2 * V * H + (2 * LAYERS + 1) * H
INPUTS_AND_OUTPUTS = LAYERS * (2 * (H + H) + 2 * (H + H // 2) + 3 * (H + M))


@pytest.mark.parametrize(
    ("train_type", "expected"),
    [
        ("full", WeightBytes(trained=4 * (WEIGHTS + DENSE))),
        ("lora", WeightBytes(unquantized=4 * (WEIGHTS + DENSE), trained=4 * R * INPUTS_AND_OUTPUTS)),
        ("hqq_lora", WeightBytes(WEIGHTS // 2, 4 * WEIGHTS // 64, 4 * DENSE, 4 * R * INPUTS_AND_OUTPUTS)),
    ],
)
def test_arithmetic(train_type, expected, checkpoints, alpaca_file, one_rank):
    memory_of_rank, _ = one_rank(load, arguments(checkpoints(), alpaca_file, train_type))[0]
    assert memory_of_rank.total_weights == expected
    assert memory_of_rank.on_gpu + memory_of_rank.on_host == expected.total


def test_double_quantized_scales_take_an_eighth_of_a_bit(checkpoints, alpaca_file, one_rank):
    weights = one_rank(load, arguments(checkpoints(), alpaca_file, "qlora"))[0][0].total_weights
    assert weights.codes == WEIGHTS // 2
    per_linear = 7 * LAYERS * 12  # the offset, one second-level scale or a part of it, and the padding
    assert WEIGHTS // 64 < weights.scales <= WEIGHTS // 64 + WEIGHTS // 64 // 64 + per_linear


def test_rows_are_sharded_as_by_fsdp():
    """7 rows over 4 ranks: 2, 2, 2, 1; over 6 ranks: 2, 2, 2, 1, 0, 0."""
    padded, exact = (PlannedParameter("weight", "unquantized", (7, 5), 2, p) for p in (True, False))
    for shards in (1, 4, 6):
        rows = [len(rows) for rows in torch.empty(7, 5).chunk(shards)]
        rows += [0] * (shards - len(rows))
        assert [exact.nbytes(shards, i) for i in range(shards)] == [10 * n for n in rows]
        assert [padded.nbytes(shards, i) for i in range(shards)] == [10 * rows[0]] * shards


# Real loads take these bytes: exactly, on a CPU, where no allocator rounds.

ON_ONE = [
    "full",
    "bnb_dora",
    "hqq_lora --n_bits 3",
    "bnb_llama_pro --precision bf16",
    "full --precision bf16_autocast --use_cpu_offload",
    "custom_qlora --lora_target_modules layers.2.self_attn.q_proj,o_proj",
    "bnb_dora --train_embeddings",
]
ON_TWO = [
    *("bnb_dora --precision bf16", "hqq_lora --precision bf16", "bnb_llama_pro --precision bf16"),
    *slow(f"{t} --precision bf16" for t in METHODS if t not in ("bnb_dora", "hqq_lora", "bnb_llama_pro")),
    "hqq_dora --n_bits 3 --group_size 32 --precision bf16_buffers_autocast",
    "hqq_lora --n_bits 2 --use_cpu_offload",
    "bnb_dora --precision fp16_autocast --wrap_policy sublayer",
    "dora --sharding_strategy shard_grad_op --lora_target_modules default",
    "llama_pro --sharding_strategy ddp --precision bf16",
    "lora --sharding_strategy hybrid_full_shard --hybrid_shard_size 1",
    "hqq_lora --train_embeddings --precision bf16",
]
FAMILIES = ["qwen2 full", "gemma2 bnb_dora", "phi3 hqq_dora", "qwen3_moe bnb_dora --lora_expert_rank 3",
            "glm4_moe_lite full --precision bf16", "gemma3 qlora --train_embeddings",
            "gemma3_wrapper bnb_dora --images true --vision_targets all --vision_bits 4",
            *slow((
                "qwen2 qlora", "gemma3 full", "qwen3_moe qlora", "qwen3_moe full",
                "gemma3_wrapper lora --images true --precision bf16_autocast",
                "phi full --precision bf16_autocast", "phi bnb_dora --train_embeddings --precision bf16",
                "qwen2_moe qlora", "mixtral qlora", "gpt_oss bnb_dora --lora_expert_rank 3",
                "glm4_moe_lite bnb_dora"))]  # fmt: skip


def options(given: str, checkpoints, alpaca_file, kind: str | None = None) -> list[str]:
    train_type, *more = given.split()
    return arguments(checkpoints(kind or biased_checkpoint(train_type)), alpaca_file, train_type, *more)


def load(rank_info, args) -> tuple[ExpectedMemory, int]:
    """Load a model with the check; return (the rank's expected memory, the bytes of its parameters)."""
    model, expected = train.set_up(make_job(rank_info, args), rank_info)
    return expected, memory.host_weight_bytes(model)


def assert_as_expected(results) -> None:
    for expected, held in results:
        assert expected.on_gpu + expected.on_host == held


@pytest.mark.parametrize("given", ON_ONE)
def test_one_rank(given, checkpoints, alpaca_file, one_rank):
    assert_as_expected(one_rank(load, options(given, checkpoints, alpaca_file)))


@pytest.mark.parametrize("given", ON_TWO)
def test_two_ranks(given, checkpoints, alpaca_file, two_ranks):
    assert_as_expected(two_ranks(load, options(given, checkpoints, alpaca_file)))


@pytest.mark.parametrize("given", FAMILIES)
def test_families(given, checkpoints, alpaca_file, two_ranks):
    """Tied embeddings, quantization blocks that cross rows, fused linears, experts, biased heads, towers."""
    kind, _, train_type = given.partition(" ")
    assert_as_expected(two_ranks(load, options(train_type, checkpoints, alpaca_file, kind)))


def test_groups(checkpoints, alpaca_file, four_ranks):
    """Each group has a copy; rows of A, rows of the vocabulary and words of scales divide unevenly."""
    args = options("bnb_dora --lora_rank 6 --sharding_strategy", checkpoints, alpaca_file)
    results = four_ranks(load, [*args, "hybrid_full_shard", "--hybrid_shard_size", "2"])
    assert_as_expected(results)
    assert sum(held for _, held in results) == pytest.approx(2 * results[0][0].total_weights.total, rel=1e-3)
    assert_as_expected(four_ranks(load, [*args, "full_shard"]))


@pytest.mark.parametrize("double", [True, False])
def test_weights_that_are_packed_already(double, checkpoints, alpaca_file, two_ranks, tmp_path):
    pack_like_the_hub(checkpoints("llama_bias"), tmp_path / "4bit", double)
    args = arguments(tmp_path / "4bit", alpaca_file, "bnb_dora")
    assert_as_expected(two_ranks(load, args))


# Faulty loads do not take these bytes. A fault wraps the function that it is in.


def unsharded(wrap: Callable) -> Callable:
    """The head is not sharded."""

    def faulty(model, *rest, **options):
        wrap(model, *rest, **options)
        full = torch.empty(model.lm_head.weight.shape, dtype=model.lm_head.weight.dtype, device="meta")
        model.lm_head.weight = nn.Parameter(full, requires_grad=False)

    return faulty


def wide(apply_method: Callable) -> Callable:
    """The MLP of one of three layers is fp32 instead of bf16."""

    def faulty(model, *rest):
        apply_method(model, *rest)
        model.model.layers[0].mlp.float()

    return faulty


def unpacked(quantize_linears: Callable) -> Callable:
    """One linear stays dense."""

    def faulty(model, quantizers, dtype):
        del quantizers["model.layers.1.mlp.up_proj"]
        quantize_linears(model, quantizers, dtype)

    return faulty


def without_adapters(adapted_linears: Callable) -> Callable:
    """One of three layers has no adapters."""
    return lambda *given: [name for name in adapted_linears(*given) if ".layers.0." not in name]


def error_of_load(rank_info, args, where: str, fault: Callable) -> str:
    job = make_job(rank_info, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, fault(pkgutil.resolve_name(where)))
        try:
            train.set_up(job, rank_info)
        except AssertionError as e:
            return str(e)
    return "loaded"


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the allowance for rounding is larger than these models' faults"
)
@pytest.mark.parametrize(
    ("where", "fault", "given", "ranks"),
    [
        ("train.wrap", unsharded, "lora --precision bf16", "two_ranks"),
        ("train.wrap", unsharded, "qlora --use_cpu_offload", "two_ranks"),
        ("train.apply_method", wide, "lora --precision bf16", "one_rank"),
        ("train.apply_method", wide, "lora --precision bf16", "two_ranks"),
        ("models.adapters.quantize_linears", unpacked, "qlora", "one_rank"),
        ("models.adapters.quantize_linears", unpacked, "hqq_dora --precision bf16", "two_ranks"),
        ("models.adapters.adapted_linears", without_adapters, "dora", "two_ranks"),
    ],
)
def test_a_faulty_load_ends_the_run(where, fault, given, ranks, checkpoints, alpaca_file, request):
    args = options(given, checkpoints, alpaca_file)
    for error in request.getfixturevalue(ranks)(error_of_load, args, where, fault):
        held = r"the loaded weights take [\d.]+ MiB of host memory on this rank"
        assert re.fullmatch(rf"{held}; the checkpoint's shapes and the options say [\d.]+ MiB", error)


HELD = 4 * (1000 * 1000 + 1000)  # bytes of the layer in `passes`


@pytest.mark.parametrize(("factor", "good"), [(0.96, False), (0.972, True), (1.029, True), (1.04, False)])
def test_the_tolerance(factor, good):
    expected = ExpectedMemory(WeightBytes(), 0, 0, on_gpu=0, on_host=int(HELD / factor), n_tensors=2)
    assert passes(expected) == good


def passes(expected: ExpectedMemory, before: int = 0) -> bool:
    """Return whether a layer of HELD bytes passes the check."""
    try:
        check_loaded(nn.Linear(1000, 1000), expected, before)
    except AssertionError:
        return False
    return True


def test_a_gpu_is_measured_by_its_allocator(monkeypatch):
    """All bytes allocated since `before` count; each tensor may be rounded up."""
    expected = ExpectedMemory(WeightBytes(), 0, 0, on_gpu=100_000, on_host=HELD, n_tensors=10)
    most = 103_000 + 10 * ROUNDING_PER_TENSOR
    for held, good in ((most, True), (most + 100, False), (90_000, True), (80_000, False)):
        monkeypatch.setattr(memory, "gpu_bytes_allocated", lambda held=held: held + 5)
        assert passes(expected, before=5) == good


def test_host_memory_that_cannot_be_pinned_is_pageable():
    """Without a GPU, no memory can be pinned."""
    weight = torch.empty(3, 4, dtype=torch.bfloat16, device="meta")
    host = memory.empty_on_host(weight, "cuda")
    assert (host.device.type, host.shape, host.dtype) == ("cpu", weight.shape, weight.dtype)
