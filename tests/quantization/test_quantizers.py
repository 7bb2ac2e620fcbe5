"""The quantizers against bitsandbytes and hqq, and the weights that they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import bitsandbytes.functional as bnb
import pytest
import torch
from hqq.core.quantize import Quantizer

from finished import merge
from options.errors import UserError
from options.methods import HQQ_BITS
from quantization import hqq
from quantization.hqq import HQQ, pack_bits
from tests.helpers.layers import quantized, weights_far_from_zero

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight after bitsandbytes' own round trip, with its own state object.

    As a single row: bitsandbytes' kernel for CPUs with AVX-512 is wrong where blocks cross rows.
    """
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    state.dtype, state.shape = dtype, torch.Size([1, weight.numel()])
    return bnb.dequantize_4bit(codes, state).view(weight.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 256), (96, 96), (300, 1000), (7, 12)])
def test_dequantized_weight_is_bitsandbytes_own(shape, stored, dtype):
    """Also if blocks cross rows, the last block is not full, and bytes do not fill a storage element."""
    weight = torch.randn(shape, dtype=stored)
    found = quantized(weight, dtype).weight
    assert torch.equal(found, reference(weight, dtype))
    assert 0.05 < (found - weight).norm() / weight.norm() < 0.12  # NF4's error


@pytest.mark.parametrize("n_bits", HQQ_BITS)
def test_plain_operations_dequantize_in_chunks(n_bits, monkeypatch):
    quantizer, shape = HQQ(n_bits), (19, 64)
    packed = (*quantizer.quantize(torch.randn(shape)), None, shape, torch.float32)
    expected = quantizer.dequantize(*packed)
    monkeypatch.setattr(hqq, "CHUNK_WEIGHTS", 8 * 64)
    with mock.patch.object(hqq, "_unpack_bits", wraps=hqq._unpack_bits) as values:
        assert torch.equal(quantizer.dequantize(*packed), expected)
    assert [len(call.args[0]) for call in values.mock_calls] == [64 * n_bits, 64 * n_bits, 24 * n_bits]


def weight_with(value: float) -> torch.Tensor:
    return torch.randn(2, 64).index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(value))


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (
            torch.cat((torch.randn(3, 64), weights_far_from_zero(1))),
            "has a block whose weights lie too far from 0",
        ),
        (weight_with(torch.nan), "holds NaN or infinity"),
        (weight_with(torch.inf), "holds NaN or infinity"),
    ],
    ids=["close together", "NaN", "infinity"],
)
def test_weights_that_hqq_cannot_pack_are_refused(weight, why):
    HQQ(4).quantize(weights_far_from_zero(2))
    with pytest.raises(ValueError, match=why):
        HQQ(8).quantize(weight)
    files = SimpleNamespace(
        read=lambda *_: weight, tensors={"a.weight": weight}, tensor_origin=lambda name: f"file: {name}"
    )
    # By a merge; by a load: tests/test_quantize_layers.py.
    with pytest.raises(UserError, match=f"file: a.weight:? {why}"):
        merge._read_merged_weight(files, "a.weight", HQQ(8), None, 0.0, torch.device("cpu"), None)


@pytest.mark.parametrize("n_bits", HQQ_BITS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "block"), [((48, 64), 64), ((96, 96), 64), ((40, 60), 8), ((64, 128), 128)]
)
def test_dequantized_weight_is_hqqs_own(shape, block, stored, n_bits):
    """Compare with hqq's own round trip and packing, with scales and zero points in fp16 as on a GPU.

    Also if groups cross rows.
    """
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
