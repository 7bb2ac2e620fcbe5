"""The arithmetic of the weights, and the check that it holds after every load."""

from __future__ import annotations

import pytest
import torch

import memory
from tests.runs import set_up
from tests.test_parity import arguments

H, M, V, LAYERS, R = 64, 160, 300, 3, 8  # tests/tiny.py's Llama; rank of `arguments`
WEIGHTS = LAYERS * (2 * H * H + 2 * H * (H // 2) + 3 * H * M)
DENSE = 2 * V * H + (2 * LAYERS + 1) * H
INPUTS_AND_OUTPUTS = LAYERS * (2 * (H + H) + 2 * (H + H // 2) + 3 * (H + M))


@pytest.mark.parametrize(
    ("train_type", "expected"),
    [
        ("full", memory.WeightBytes(trained=4 * (WEIGHTS + DENSE))),
        ("lora", memory.WeightBytes(unquantized=4 * (WEIGHTS + DENSE), trained=4 * R * INPUTS_AND_OUTPUTS)),
        (
            "hqq_lora",
            memory.WeightBytes(WEIGHTS // 2, 4 * WEIGHTS // 64, 4 * DENSE, 4 * R * INPUTS_AND_OUTPUTS),
        ),
    ],
)
def test_arithmetic(train_type, expected, checkpoints, alpaca_file, one_rank):
    assert one_rank(weights_of, arguments(checkpoints(), alpaca_file, train_type))[0] == expected


def weights_of(place, args):
    return memory.weight_bytes(set_up(place, args)[1])


def test_double_quantized_scales_take_an_eighth_of_a_bit(checkpoints, alpaca_file, one_rank):
    weights = one_rank(weights_of, arguments(checkpoints(), alpaca_file, "qlora"))[0]
    assert weights.codes == WEIGHTS // 2
    per_linear = 7 * LAYERS * 12  # the offset, one second-level scale or a part of it, and the padding
    assert WEIGHTS // 64 < weights.scales <= WEIGHTS // 64 + WEIGHTS // 64 // 64 + per_linear


def test_ranks_hold_the_arithmetics_share(checkpoints, alpaca_file, two_ranks):
    first, second = two_ranks(
        held_and_expected, arguments(checkpoints("llama_bias"), alpaca_file, "bnb_dora")
    )
    total = first[2]
    assert first[0] == first[1] and second[0] == second[1]
    assert first[0] + second[0] == total and first[0] == pytest.approx(total / 2, rel=0.03)


def held_and_expected(place, args) -> tuple[int, int, int]:
    _, model = set_up(place, args)
    return memory.held_bytes(model, 0, False), memory.rank_bytes(model), memory.weight_bytes(model).total


def test_a_load_that_takes_more_or_less_is_an_error():
    model = torch.nn.Linear(1000, 1000)
    expected = memory.rank_bytes(model)
    memory.check_loaded(model, expected)
    memory.check_loaded(model, int(expected * 1.029))
    for wrong in (expected * 1.04, expected * 0.96):
        with pytest.raises(AssertionError, match=r"take .* on this rank"):
            memory.check_loaded(model, int(wrong))


def test_host_memory_that_cannot_be_pinned_is_plain():
    """Without a GPU none can."""
    weight = torch.empty(3, 4, dtype=torch.bfloat16, device="meta")
    host = memory.empty_on_host(weight, "cuda")
    assert (host.device.type, host.shape, host.dtype) == ("cpu", weight.shape, weight.dtype)
