"""Layers replayed from CUDA graphs give the results of the same layers without, bit for bit."""

from __future__ import annotations

import contextlib
import json
from unittest import mock

import pytest
import torch

import train
from launch.precision import enable_determinism
from parallel import layer_graphs
from parallel.fixed_tensors import Copies
from parallel.layer_graphs import LayerGraphs, make_layer_graphs
from tests.helpers.image_runs import image_arguments
from tests.helpers.parity import arguments, follows
from tests.helpers.runs import train_run

STEPS = ["--max_steps", "8", "--num_epochs", "8", "--precision", "auto"]


def run_on_gpu(rank_info, args: list[str], sharded: bool) -> tuple:
    """Return (`train_run`'s results, recordings, reported lines); layers are compiled."""
    made: list[LayerGraphs | None] = []
    lines: list[str] = []

    def keep(*args):
        made.append(make_layer_graphs(*args))
        if made[0]:
            made[0]._report = lines.append
        return made[0]

    torch.compiler.reset()
    enable_determinism()
    units = mock.patch("wrapping.needs_units", lambda *_: True) if sharded else contextlib.nullcontext()
    with mock.patch.object(train, "make_layer_graphs", keep), units:
        results = train_run(rank_info, [*args, "--compile", "true"])
    torch.use_deterministic_algorithms(False)
    recorded = len([r for r in made[0].recordings.values() if r]) if made[0] else 0
    return results, recorded, lines


def run_both_ways(one_rank, args: list[str], sharded: bool) -> list[tuple]:
    """Return the results of `run_on_gpu` without graphs, and with them."""
    return [one_rank(run_on_gpu, [*args, "--cuda_graphs", way], sharded)[0] for way in ("false", "true")]


def assert_equal_runs(plain: tuple, graphed: tuple) -> None:
    (losses, tensors, norms), (others, other_tensors, other_norms) = plain[0], graphed[0]
    assert losses == others and norms == other_norms
    assert losses[0] > losses[-1]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name


OPTIONS = {
    "checkpointing": "--use_gradient_checkpointing true",
    "all saved": "--use_gradient_checkpointing false",
    "layer inputs on the host": "--use_gradient_checkpointing true --use_activation_cpu_offload",
    "accumulation": "--batch_size 2 --gradient_accumulation_steps 2",
    "some results saved": "--activation_budget 0.001",
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("train_type", "options", "sharded"),
    [
        ("qlora", "checkpointing", True),
        ("qlora", "all saved", True),
        ("qlora", "layer inputs on the host", True),
        ("qlora", "accumulation", False),
        ("qlora", "some results saved", False),
        ("bnb_dora", "checkpointing", True),
        ("bnb_dora", "all saved", False),
        ("hqq_dora", "checkpointing", True),
        ("full", "checkpointing", False),
    ],
)
def test_replays_equal_the_layers(train_type, options, sharded, checkpoints, even_rows, one_rank):
    args = [*arguments(checkpoints("llama"), even_rows, train_type), "--batch_size", "4", *STEPS]
    plain, graphed = run_both_ways(one_rank, [*args, *OPTIONS[options].split()], sharded)
    assert graphed[1], graphed[2]
    assert not [line for line in graphed[2] if "without" in line], graphed[2]
    assert_equal_runs(plain, graphed)


def run_auto(rank_info, args: list[str]) -> tuple:
    """`run_on_gpu` with --cuda_graphs auto, which decides after two steps."""
    with mock.patch.object(layer_graphs, "MARKS_WATCHED", 12):
        return run_on_gpu(rank_info, [*args, "--cuda_graphs", "auto"], sharded=False)


@pytest.mark.gpu
@pytest.mark.parametrize("train_type", ["bnb_dora", "bnb_llama_pro"])
def test_auto_records_where_the_gpu_waits(train_type, checkpoints, even_rows, one_rank):
    """These layers are so small that the GPU always waits for the host."""
    model = checkpoints("llama_bias_pro" if train_type == "bnb_llama_pro" else "llama")
    args = [*arguments(model, even_rows, train_type), "--batch_size", "4", *STEPS]
    plain = one_rank(run_on_gpu, [*args, "--cuda_graphs", "false"], False)[0]
    graphed = one_rank(run_auto, args)[0]
    assert graphed[1], graphed[2]
    assert_equal_runs(plain, graphed)


@pytest.mark.gpu
def test_replays_of_layers_that_save_attention(checkpoints, one_rank, tmp_path):
    """Rows are longer than the model is wide, and the budget is too small for the results of matmuls."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": letter * 120}) + "\n" for letter in "abcdefgh"))
    args = [*arguments(checkpoints("llama"), rows, "bnb_dora"), "--batch_size", "4", *STEPS]
    plain, graphed = run_both_ways(one_rank, [*args, "--activation_budget", "0.0003"], False)
    assert graphed[1], graphed[2]
    assert_equal_runs(plain, graphed)
    follows(one_rank(train_run, [*args, "--compile", "true"])[0], plain[0])


@pytest.mark.gpu
@pytest.mark.parametrize("more", [(), ("--packing", "--context_length", "300")], ids=["padded", "packed"])
def test_replays_with_images_equal_the_layers(more, one_rank, tmp_path):
    """Rows have 0 to 2 images: micro-batches differ in their shapes and masks."""
    args = [*image_arguments(tmp_path, "gemma3", *more), "--chat_template", "chatml", *STEPS]
    plain, graphed = run_both_ways(one_rank, args, False)
    assert_equal_runs(plain, graphed)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "reason"),
    [("--lora_dropout 0.1", "dropout"), ("--batch_size 1 --max_steps 24", "other shapes")],
    ids=["dropout", "many lengths"],
)
def test_other_calls_run_as_ever(options, reason, checkpoints, alpaca_file, one_rank):
    args = [*arguments(checkpoints("llama"), alpaca_file, "qlora"), "--batch_size", "4", *STEPS]
    plain, graphed = run_both_ways(one_rank, [*args, *options.split()], True)
    assert any(reason in line for line in graphed[2]), graphed[2]
    assert_equal_runs(plain, graphed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint64, torch.uint32, torch.uint16, torch.bfloat16, torch.bool])
def test_copies_of_any_dtype(dtype):
    """Flash attention saves its state of the random numbers as uint64."""
    tensors = [torch.tensor([1, 0, 1]).to("cuda", dtype), torch.tensor(1).to("cuda", dtype)]
    copies = Copies([torch.empty_like(tensor) for tensor in tensors])
    copies.copy_in(tensors)
    assert [copy.tolist() for copy in copies.copy_out()] == [tensor.tolist() for tensor in tensors]
