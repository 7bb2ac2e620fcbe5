"""Weights that a checkpoint stores packed by bitsandbytes, and the streaming load.

--quantized_cache is tested in tests/files/test_weight_cache.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
from files.model_folder import CheckpointFiles
from options.errors import UserError
from tests.helpers import bnb_checkpoints
from tests.helpers.adapters import args_for
from tests.helpers.bnb_checkpoints import (
    QLORA,
    make_single_rank_job,
    pack_like_the_hub,
    set_quantization_config,
    without_quantizing,
)
from tests.helpers.expansion import edit_config
from tests.helpers.finished_runs import write_random_run
from tests.helpers.logits import IDS, transformers_logits
from tests.helpers.products import products, slow
from tests.helpers.runs import dense_state, outputs, set_up, transformers_model
from tests.helpers.stored import write_dense


@pytest.mark.parametrize(
    ("train_type", "double", "storage"),
    products(
        *(["qlora", "bnb_dora"], [True, False], [torch.uint8, torch.bfloat16]),
        always=[("bnb_dora", True, torch.uint8), ("bnb_dora", False, torch.bfloat16)],
        left_out=["qlora"],
    ),
)
def test_a_bnb_checkpoint_is_not_quantized_again(
    train_type, double, storage, checkpoints, alpaca_file, one_rank, two_ranks, tmp_path
):
    """The weights are bitsandbytes' bit for bit; the logits are transformers' on those weights."""
    expected = pack_like_the_hub(checkpoints("llama_bias"), tmp_path / "4bit", double, storage)
    args = ["--model_name", tmp_path / "4bit", "--dataset", alpaca_file, "--train_type", train_type]
    logits, one, _ = one_rank(without_quantizing, outputs, args, IDS, False)[0]
    two = two_ranks(without_quantizing, dense_state, args)[1]
    assert one.keys() == two.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(one[name], tensor) and torch.equal(two[name], tensor), name
    with torch.no_grad():
        reference = transformers_model(checkpoints("llama_bias"), expected)(input_ids=IDS).logits
    torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", *slow(["qwen2_moe", "qwen3_moe"])])
def test_packed_routers_are_dequantized(kind, checkpoints, alpaca_file, one_rank, two_ranks, tmp_path):
    """transformers 4 packed them as linears. They stay frozen, and the merged folder holds them, too."""
    expected = pack_like_the_hub(checkpoints(kind), tmp_path / "4bit")
    routers = [name for name in expected if name.endswith("gate.weight")]
    assert len(routers) == {"mixtral": 3, "qwen2_moe": 4, "qwen3_moe": 2}[kind]
    args = args_for(tmp_path / "4bit", alpaca_file, "qlora")
    ours, one, _ = one_rank(without_quantizing, outputs, args, IDS, False)[0]
    two = two_ranks(without_quantizing, dense_state, args)[1]
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    dense = shutil.copytree(checkpoints(kind), tmp_path / "dense")
    write_dense(dense, expected)
    torch.testing.assert_close(ours, transformers_logits(dense), rtol=1e-5, atol=1e-5)
    answered = write_random_run(one_rank, tmp_path / "run", args)
    exported = f"{tmp_path}/run --to merged --out {tmp_path}/out --dtype float32 --check false"
    assert export.main(exported.split()) == 0
    torch.testing.assert_close(transformers_logits(tmp_path / "out"), answered, rtol=1e-4, atol=1e-4)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], expected[name]) for name in routers)


def test_a_packed_head_is_named(checkpoints, alpaca_file, tmp_path, monkeypatch):
    monkeypatch.setattr(bnb_checkpoints, "LINEARS", ("lm_head.weight",))
    pack_like_the_hub(checkpoints(), tmp_path / "4bit")
    with pytest.raises(UserError, match=r"lm_head.weight is packed; only weights of decoder layers can be: "):
        make_single_rank_job(tmp_path / "4bit", alpaca_file, *QLORA)


@pytest.mark.parametrize("is_said", [True, False])
def test_it_cannot_be_expanded(is_said, checkpoints, alpaca_file, tmp_path):
    """Also if config.json does not say that the weights are packed."""
    pack_like_the_hub(checkpoints("llama_bias_pro"), tmp_path / "4bit")
    if not is_said:
        edit_config(tmp_path / "4bit", quantization_config=None)
    with pytest.raises(UserError, match="new blocks need the original weights"):
        make_single_rank_job(tmp_path / "4bit", alpaca_file, "--train_type", "bnb_llama_pro")


@pytest.mark.parametrize("train_type", ["full", "lora", "dora", "hqq_lora"])
def test_other_train_types_cannot_use_it(train_type, checkpoints, alpaca_file, tmp_path):
    pack_like_the_hub(checkpoints(), tmp_path / "4bit")
    with pytest.raises(UserError, match=f"packed by bitsandbytes already.*{train_type}.* or take the model"):
        make_single_rank_job(tmp_path / "4bit", alpaca_file, "--train_type", train_type)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_type": "fp4"}, "quant_type fp4; only nf4"),
        ({"blocksize": 128}, "blocksize 128; only 64"),
    ],
)
def test_other_kinds_of_bnb_weights(quantization, words, checkpoints, alpaca_file, tmp_path):
    pack_like_the_hub(checkpoints(), tmp_path / "4bit", **quantization)
    with pytest.raises(UserError, match=words):
        make_single_rank_job(tmp_path / "4bit", alpaca_file, *QLORA)


@pytest.mark.parametrize("train_type", ["full", "qlora", "dora", "hqq_lora"])
def test_only_the_config_says_that_weights_are_packed(train_type, checkpoints, alpaca_file, tmp_path):
    folder = shutil.copytree(checkpoints(), tmp_path / "plain")
    set_quantization_config(folder, load_in_4bit=True, quant_method="bitsandbytes")
    with pytest.raises(UserError, match=f"^{folder}/config.json: quantization_config says .* no file"):
        make_single_rank_job(folder, alpaca_file, "--train_type", train_type)


def test_a_bnb_weight_without_its_scales(checkpoints, alpaca_file, tmp_path):
    pack_like_the_hub(checkpoints(), tmp_path / "4bit")
    stored = load_file(tmp_path / "4bit" / "model.safetensors")
    del stored["model.layers.0.self_attn.q_proj.weight.absmax"]
    save_file(stored, tmp_path / "4bit" / "model.safetensors")
    with pytest.raises(UserError, match="does not describe a packed weight"):
        make_single_rank_job(tmp_path / "4bit", alpaca_file, *QLORA)


def replace_offset(value):
    """Return a function that replaces the scales' offset in the description of a packed weight."""
    return lambda t: to_byte_tensor(json.dumps(json.loads(bytes(t.tolist())) | {"nested_offset": value}))


@pytest.mark.parametrize(
    ("part", "spoil", "words"),
    [
        ("quant_map", lambda t: t[:8], "quant_map is not that of nf4"),
        ("quant_map", lambda t: t.int(), "quant_map is not that of nf4"),
        ("nested_quant_map", lambda t: torch.cat([t, t]), "nested_quant_map is not that of nf4"),
        ("nested_quant_map", lambda t: -t, "nested_quant_map is not that of nf4"),
        ("absmax", lambda t: t[:-1], "holds too little or too much"),
        ("quant_state.bitsandbytes__nf4", lambda t: to_byte_tensor("[" * 10**5), "does not describe"),
        ("quant_state.bitsandbytes__nf4", lambda t: t[:-1], "does not describe"),
        ("quant_state.bitsandbytes__nf4", replace_offset(math.inf), "does not describe"),
        ("quant_state.bitsandbytes__nf4", replace_offset(1e39), "does not describe"),
        ("quant_state.bitsandbytes__nf4", replace_offset(10**401), "does not describe"),
        ("quant_state.bitsandbytes__nf4", replace_offset(True), "does not describe"),
    ],
)
def test_damaged_bnb_weights(part, spoil, words, checkpoints, alpaca_file, tmp_path):
    pack_like_the_hub(checkpoints(), tmp_path / "4bit")
    stored = load_file(tmp_path / "4bit" / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.weight.{part}"
    stored[name] = spoil(stored[name]).contiguous()
    save_file(stored, tmp_path / "4bit" / "model.safetensors")
    with pytest.raises(UserError, match=words):
        make_single_rank_job(tmp_path / "4bit", alpaca_file, *QLORA)


def to_byte_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_a_bnb_checkpoint_needs_no_cache(checkpoints, alpaca_file, tmp_path):
    pack_like_the_hub(checkpoints(), tmp_path / "4bit")
    with pytest.raises(UserError, match=r"--quantized_cache.*packed already"):
        make_single_rank_job(tmp_path / "4bit", alpaca_file, *QLORA, "--quantized_cache", tmp_path / "cache")


# The streaming load


def test_any_number_of_workers_loads_the_same(checkpoints, alpaca_file, two_ranks):
    args = ["--model_name", checkpoints("llama_bias"), "--dataset", alpaca_file, *QLORA, "--loading_workers"]
    one, four = (two_ranks(dense_state, [*args, n])[0] for n in (1, 4))
    assert all(torch.equal(one[k], v) for k, v in four.items())


@pytest.mark.parametrize("workers", [1, 3])
def test_few_full_tensors_are_in_memory(workers, checkpoints, alpaca_file, two_ranks):
    args = ["--model_name", checkpoints(), "--dataset", alpaca_file, *QLORA, "--loading_workers", workers]
    for most, total in two_ranks(count_tensors_alive, args):
        assert 1 <= most <= workers + 1 and total > 10


def count_tensors_alive(rank_info, args) -> tuple[int, int]:
    """Load; return (maximum number of tensors alive at once, number of tensors read)."""
    alive, most, original = set(), [], CheckpointFiles.read

    def read(self, name, *buffers):
        tensor = original(self, name, *buffers)
        alive.add(name)
        weakref.finalize(tensor, alive.discard, name)
        most.append(len(alive))
        return tensor

    CheckpointFiles.read = read
    try:
        set_up(rank_info, args)
    finally:
        CheckpointFiles.read = original
    return max(most), len(most)


@pytest.mark.slow
def test_every_node_reads_for_itself(checkpoints, alpaca_file, one_rank, four_ranks):
    """Four ranks as two nodes of two: each node reads every tensor once, and all hold the same model."""
    args = ["--model_name", checkpoints("llama_bias"), "--dataset", alpaca_file, "--train_type", "bnb_dora"]
    plain = one_rank(dense_state, args)[0]
    results = four_ranks(load_as_two_nodes, args)
    for _, state in results:
        assert state.keys() == plain.keys() and all(torch.equal(state[k], v) for k, v in plain.items())
    first, second, third, fourth = (set(read) for read, _ in results)
    assert first == third and second == fourth and not first & second
    assert first | second == plain.keys()


def load_as_two_nodes(rank_info, args):
    """Load as rank of a node of two; return (names of the tensors read, the dense weights)."""
    read, original = [], CheckpointFiles.read
    CheckpointFiles.read = lambda self, name, *buffers: (read.append(name), original(self, name, *buffers))[1]
    try:
        rank_info = dataclasses.replace(rank_info, local_rank=rank_info.rank % 2, local_world=2)
        return read, dense_state(rank_info, args)
    finally:
        CheckpointFiles.read = original
