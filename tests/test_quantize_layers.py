"""The 4-bit linear layer against bitsandbytes itself, and the streaming load."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from unittest import mock

import bitsandbytes.functional as bnb
import pytest
import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import load_file, save_file
from torch import nn

from finished import merge
from options.config import HQQ_BITS
from options.errors import UserError
from quantization import quantizers
from quantization.quantizers import HQQ, NF4, pack_bits
from quantize_layers import STORAGE, as_storage
from tests.helpers.layers import close_together, quantized
from tests.helpers.runs import dense_state, set_up

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' own round trip, with its own state object, of the weight as a single row: its kernel for CPUs with
    AVX-512 is wrong where blocks cross rows."""
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    state.dtype, state.shape = dtype, torch.Size([1, weight.numel()])
    return bnb.dequantize_4bit(codes, state).view(weight.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 256), (96, 96), (300, 1000), (7, 12)])
def test_dequantized_weight_is_bitsandbytes_own(shape, stored, dtype):
    """Also where blocks cross rows, the last block is not full, and bytes do not fill a storage element."""
    weight = torch.randn(shape, dtype=stored)
    found = quantized(weight, dtype).weight
    assert torch.equal(found, reference(weight, dtype))
    assert 0.05 < (found - weight).norm() / weight.norm() < 0.12  # NF4's error


@pytest.mark.parametrize("n_bits", HQQ_BITS)
def test_plain_operations_expand_some_blocks_at_a_time(n_bits, monkeypatch):
    quantizer, shape = HQQ(n_bits), (19, 64)
    packed = (*quantizer.quantize(torch.randn(shape)), None, shape, torch.float32)
    whole = quantizer.dequantize(*packed)
    monkeypatch.setattr(quantizers, "EXPANDED", 8 * 64)
    with mock.patch.object(quantizers, "_values", wraps=quantizers._values) as values:
        assert torch.equal(quantizer.dequantize(*packed), whole)
    assert [len(call.args[0]) for call in values.mock_calls] == [64 * n_bits, 64 * n_bits, 24 * n_bits]


def unfit(value: float) -> torch.Tensor:
    return torch.randn(2, 64).index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(value))


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (torch.cat((torch.randn(3, 64), close_together(1))), "has a block whose weights lie too far from 0"),
        (unfit(torch.nan), "holds NaN or infinity"),
        (unfit(torch.inf), "holds NaN or infinity"),
    ],
    ids=["close together", "NaN", "infinity"],
)
def test_weights_that_hqq_cannot_pack_are_refused(weight, why):
    HQQ(4).quantize(close_together(2))
    with pytest.raises(ValueError, match=why):
        HQQ(8).quantize(weight)
    files = SimpleNamespace(read=lambda *_: weight, tensors={"a.weight": weight})
    with pytest.raises(UserError, match=f"a.weight: {why}"):  # of a merge; of a load: below
        merge._weight(files, "a.weight", HQQ(8), None, 0.0, torch.device("cpu"), None)


def test_a_weight_that_cannot_be_quantized_is_named(checkpoints, alpaca_file, one_rank, tmp_path):
    model = shutil.copytree(checkpoints(), tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    path = next(p for p in model.glob("*.safetensors") if name in load_file(p))
    stored = load_file(path)
    stored[name].view(-1, 64)[2] = close_together(1)[0]
    save_file(stored, path)
    args = ["--model_name", model, "--dataset", alpaca_file, "--train_type", "hqq_lora", "--n_bits", "8"]
    with pytest.raises(AssertionError, match=f"UserError: {name}: has a block whose weights"):
        one_rank(set_up, args)


@pytest.mark.parametrize("n_bits", HQQ_BITS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "block"), [((48, 64), 64), ((96, 96), 64), ((40, 60), 8), ((64, 128), 128)]
)
def test_dequantized_weight_is_hqqs_own(shape, block, stored, n_bits):
    """hqq's own round trip with its own packing, its scales and zero points rounded to fp16 as hqq itself has
    them on a GPU. Also where groups cross rows."""
    weight = torch.randn(shape, dtype=stored) * 0.05
    codes, meta = Quantizer.quantize(weight, nbits=n_bits, group_size=block, axis=1, device="cpu")
    meta |= {name: meta[name].half().float() for name in ("scale", "zero")} | {"compute_dtype": torch.float32}
    expected = Quantizer.dequantize(codes, meta)
    for dtype in DTYPES:
        assert torch.equal(quantized(weight, dtype, None, HQQ(n_bits, block)).weight, expected.to(dtype))
    error = (expected - weight).norm() / weight.norm()
    assert error < {8: 0.01, 4: 0.12, 3: 0.25, 2: 0.6}[n_bits]


@pytest.mark.parametrize("n_bits", HQQ_BITS)
def test_bits_are_packed_without_gaps(n_bits):
    codes = torch.randint(0, 2**n_bits, (3, 64))
    packed = pack_bits(codes, n_bits)
    assert packed.dtype == torch.uint8 and packed.numel() * 8 == codes.numel() * n_bits
    stream = sum(int(byte) << 8 * i for i, byte in enumerate(packed))
    assert [(stream >> n_bits * i) % 2**n_bits for i in range(codes.numel())] == codes.flatten().tolist()


@pytest.mark.parametrize("quantizer", [NF4(), HQQ(4), HQQ(3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_are_those_of_the_dequantized_weight(dtype, quantizer):
    weight, bias = torch.randn(48, 64), torch.randn(48)
    layer = quantized(weight, dtype, bias, quantizer)
    dense = layer.weight
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    y, expected = layer(x), nn.functional.linear(other, dense, bias.to(dtype))
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-6, atol=1e-6)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == []


@pytest.mark.parametrize("quantizer", [NF4(), HQQ(4)], ids=str)
def test_only_packed_weights_are_saved_for_backward(quantizer):
    """Saving the dequantized weight would hold 16 bits per weight from forward to backward."""
    layer, kept = quantized(torch.randn(256, 256), torch.float32, None, quantizer), []
    x = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
        layer(x).sum()
    assert (
        sum(kept) < 256 * 256
    )  # codes 32 KiB, scales 1 to 4 KiB, the table 1 KiB; a dense weight is 256 KiB


@pytest.mark.parametrize("quantizer", [NF4(), HQQ(4), HQQ(3)], ids=str)
def test_forward_and_backward_compile_without_a_graph_break(quantizer):
    layer = quantized(torch.randn(64, 64), torch.float32, torch.randn(64), quantizer)
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


@pytest.mark.parametrize(
    ("train_type", "quantizer"),
    [("qlora", NF4()), ("hqq_lora", HQQ(4)), ("hqq_dora --n_bits 3 --group_size 32", HQQ(3, 32))],
)
def test_loaded_weights_are_the_checkpoint_quantized(
    train_type, quantizer, checkpoints, alpaca_file, one_rank, two_ranks
):
    """One rank and two hold the same contents, and they are what the quantizer makes of each tensor."""
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
    from tests.helpers.runs import trained_tensors

    return trained_tensors(set_up(place, args, random_adapters=False)[1])


def test_no_rank_reads_a_tensor_that_another_reads(checkpoints, alpaca_file, two_ranks):
    args = ["--model_name", checkpoints(), "--dataset", alpaca_file, "--train_type", "qlora"]
    first, second = two_ranks(tensors_read, args)
    assert not set(first) & set(second)
    assert abs(len(first) - len(second)) <= 1
    assert len(first) == len(set(first))


def tensors_read(place, args) -> list[str]:
    from files.model_folder import CheckpointFiles

    read, original = [], CheckpointFiles.read
    CheckpointFiles.read = lambda self, name, *stage: (read.append(name), original(self, name, *stage))[1]
    try:
        set_up(place, args)
    finally:
        CheckpointFiles.read = original
    return read
