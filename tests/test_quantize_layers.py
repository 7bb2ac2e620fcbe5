"""The 4-bit linear layer against bitsandbytes itself, and the streaming load."""

from __future__ import annotations

import shutil

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantize_layers import STORAGE, Linear4bit, as_storage
from tests.runs import dense_state, set_up

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(weight: torch.Tensor, dtype: torch.dtype, bias=None) -> Linear4bit:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer = Linear4bit(linear, dtype)
    layer.fill_buffers(CPU)
    for name, content in layer.pack("weight", weight).items():
        getattr(layer, name).data.copy_(content)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer


def reference(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' own round trip, with its own state object."""
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    return bnb.dequantize_4bit(codes, state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 256), (96, 96), (300, 1000), (7, 12)])
def test_dequantized_weight_is_bitsandbytes_own(shape, stored, dtype):
    """Also where blocks cross rows, the last block is not full, and bytes do not fill a storage element."""
    weight = torch.randn(shape, dtype=stored)
    assert torch.equal(quantized(weight, dtype).weight, reference(weight, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_are_those_of_the_dequantized_weight(dtype):
    weight, bias = torch.randn(48, 64), torch.randn(48)
    layer = quantized(weight, dtype, bias)
    dense = reference(weight, dtype)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    y, expected = layer(x), nn.functional.linear(other, dense, bias.to(dtype))
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-6, atol=1e-6)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == []


def test_only_packed_weights_are_saved_for_backward():
    """Saving the dequantized weight would hold 16 bits per weight from forward to backward."""
    layer, kept = quantized(torch.randn(256, 256), torch.float32), []
    x = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
        layer(x).sum()
    assert sum(kept) < 256 * 256  # codes 32 KiB, scales 1 KiB, the map 1 KiB; a dense weight is 256 KiB


def test_forward_and_backward_compile_without_a_graph_break():
    layer = quantized(torch.randn(64, 64), torch.float32, torch.randn(64))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    compiled(x).sum().backward()
    layer(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=0, atol=0)


def test_storage_holds_any_bytes():
    raw = torch.cat([torch.full((4,), 255), torch.randint(0, 256, (1019,))]).to(torch.uint8)
    stored = as_storage(raw)  # not a whole element: padded with a zero byte
    assert stored.dtype == STORAGE and stored[0].isnan()
    assert torch.equal(stored.view(torch.uint8), torch.cat([raw, torch.zeros(1, dtype=torch.uint8)]))


def test_loaded_weights_are_the_checkpoint_quantized(checkpoints, alpaca_file, one_rank, two_ranks):
    """One rank and two hold the same contents, and they are what bitsandbytes makes of each tensor."""
    folder = checkpoints("llama_bias")
    args = ["--model_name", folder, "--dataset", alpaca_file, "--train_type", "qlora"]
    one, two = one_rank(dense_state, args)[0], two_ranks(dense_state, args)[1]
    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert one.keys() == two.keys() == stored.keys()
    for name, tensor in stored.items():
        linear = "_proj.weight" in name
        expected = reference(tensor, torch.float32) if linear else tensor
        assert torch.equal(one[name], expected) and torch.equal(two[name], expected), name


def test_a_single_file_loads_like_shards(checkpoints, alpaca_file, one_rank, tmp_path):
    stored = {k: v for file in checkpoints().glob("*.safetensors") for k, v in load_file(file).items()}
    for path in checkpoints().glob("*.json"):
        if "index" not in path.name:
            shutil.copy(path, tmp_path)
    old_rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # early Llama files carry it
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


def initial_adapters(place, args):
    from tests.runs import trained_tensors

    return trained_tensors(set_up(place, args, random_adapters=False)[1])


def test_no_rank_reads_a_tensor_that_another_reads(checkpoints, alpaca_file, two_ranks):
    args = ["--model_name", checkpoints(), "--dataset", alpaca_file, "--train_type", "qlora"]
    first, second = two_ranks(tensors_read, args)
    assert not set(first) & set(second)
    assert abs(len(first) - len(second)) <= 1
    assert len(first) == len(set(first))


def tensors_read(place, args) -> list[str]:
    from model_files import CheckpointFiles

    read, original = [], CheckpointFiles.read
    CheckpointFiles.read = lambda self, name: (read.append(name), original(self, name))[1]
    try:
        set_up(place, args)
    finally:
        CheckpointFiles.read = original
    return read
