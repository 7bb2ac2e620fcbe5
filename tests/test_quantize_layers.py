"""The streaming load: each tensor is quantized by its quantizer and read once, on any number of ranks."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from files.model_folder import CheckpointFiles
from models.registry import build_on_meta, family_of
from models.shapes import SHAPES
from quantization.hqq import HQQ
from quantization.nf4 import NF4
from quantize_layers import allocate
from tests.helpers.layers import quantized
from tests.helpers.runs import dense_state, set_up, trained_tensors
from tests.helpers.towers import LiveBytes


@pytest.mark.parametrize(
    ("train_type", "quantizer"),
    [("qlora", NF4()), ("hqq_lora", HQQ(4)), ("hqq_dora --n_bits 3 --group_size 32", HQQ(3, 32))],
)
def test_loaded_weights_are_the_checkpoint_quantized(
    train_type, quantizer, checkpoints, alpaca_file, one_rank, two_ranks
):
    """One rank and two have the same weights, equal to the quantizer's result for each tensor."""
    folder = checkpoints("llama_bias")
    args = ["--model_name", folder, "--dataset", alpaca_file, "--train_type", *train_type.split()]
    one, two = one_rank(dense_state, args)[0], two_ranks(dense_state, args)[1]
    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert one.keys() == two.keys() == stored.keys()
    for name, tensor in stored.items():
        linear = "_proj.weight" in name
        expected = quantized(tensor, torch.float32, None, quantizer).weight if linear else tensor
        assert torch.equal(one[name], expected) and torch.equal(two[name], expected), name


def test_a_single_file_loads_like_shards(checkpoints, alpaca_file, one_rank, tmp_path):
    stored = {k: v for file in checkpoints().glob("*.safetensors") for k, v in load_file(file).items()}
    for path in checkpoints().glob("*.json"):
        if "index" not in path.name:
            shutil.copy(path, tmp_path)
    # Early Llama files hold the rotary frequencies, here for a head size of 16.
    frequencies = torch.tensor([10000.0 ** (-i / 8) for i in range(8)])
    old_rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies}
    save_file(stored | old_rotary, tmp_path / "model.safetensors")
    rest = ["--dataset", alpaca_file, "--train_type", "qlora"]
    sharded = one_rank(dense_state, ["--model_name", checkpoints(), *rest])[0]
    single = one_rank(dense_state, ["--model_name", tmp_path, *rest])[0]
    assert sharded.keys() == single.keys() and all(torch.equal(single[k], v) for k, v in sharded.items())


def test_adapters_start_equal_on_any_number_of_ranks(checkpoints, alpaca_file, one_rank, two_ranks):
    args = ["--model_name", checkpoints(), "--dataset", alpaca_file, "--train_type", "bnb_dora"]
    one, two = one_rank(initial_adapters, args)[0], two_ranks(initial_adapters, args)[0]
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    first = next(v for k, v in one.items() if k.endswith("lora_A"))
    bound = first.shape[1] ** -0.5  # Kaiming-uniform with a = sqrt(5)
    assert 0.9 * bound < first.abs().max() <= bound
    assert all(not v.any() for k, v in one.items() if not k.endswith("lora_A"))


def initial_adapters(rank_info, args):
    return trained_tensors(set_up(rank_info, args, random_adapters=False)[1])


def test_no_rank_reads_a_tensor_that_another_reads(checkpoints, alpaca_file, two_ranks):
    args = ["--model_name", checkpoints(), "--dataset", alpaca_file, "--train_type", "qlora"]
    first, second = two_ranks(tensors_read, args)
    assert not set(first) & set(second)
    assert abs(len(first) - len(second)) <= 1
    assert len(first) == len(set(first))


def tensors_read(rank_info, args) -> list[str]:
    """Return the names of the tensors that this rank reads."""
    read, original = [], CheckpointFiles.read
    CheckpointFiles.read = lambda self, name, *stage: (read.append(name), original(self, name, *stage))[1]
    try:
        set_up(rank_info, args)
    finally:
        CheckpointFiles.read = original
    return read


def test_a_tied_embedding_is_allocated_twice():
    """The model of memory counts this at the load's peak (monitoring/memory_model.py)."""
    config = SHAPES["tiny-gemma3"].model_config()
    family, cpu = family_of(config, images=True), torch.device("cpu")
    model = build_on_meta(config, family)
    weights, embedding = sum(p.nbytes for p in model.parameters()), model.get_input_embeddings().weight.nbytes
    with LiveBytes([]) as live:
        model.to_empty(device=cpu)
    assert live.peak == weights + sum(b.nbytes for b in model.buffers()) + embedding
    model = build_on_meta(config, family)
    allocate(model, family, cpu, cpu)
    assert sum(p.nbytes for p in model.parameters()) == weights
