"""What only a GPU can show: bf16 and NCCL. Run with `pytest tests/test_gpu.py` on a machine that has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn

from models.dora import DoRALinear
from models.family import clean
from models.lora import LoRALinear
from quantize_layers import STORAGE, Linear4bit, fill
from quantizers import NF4
from tests import tiny

ROOT = Path(__file__).parent.parent


def quantized(weight: torch.Tensor, quantizer=NF4()) -> Linear4bit:  # noqa: B008
    """A layer that computes in the weight's dtype, on its device."""
    with weight.device:
        layer = Linear4bit(nn.Linear(weight.shape[1], weight.shape[0], bias=False), weight.dtype, quantizer)
    layer.fill_buffers(weight.device)
    for name, content in layer.pack("weight", weight).items():
        getattr(layer, name).data.copy_(content)
    return layer


@pytest.mark.gpu
def test_storage_survives_the_copy_that_fsdp_makes():
    """The reason for fp32 storage: of 16-bit types the same copy loses every NaN pattern."""
    bits = torch.arange(2**16, device="cuda").to(torch.uint16)
    for dtype, safe in ((STORAGE, True), (torch.bfloat16, False)):
        source = bits.view(dtype)
        copy = [torch.empty_like(source)]
        torch._foreach_copy_(copy, [source])
        assert torch.equal(copy[0].view(torch.uint8), source.view(torch.uint8)) == safe


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantized_weight_is_bitsandbytes_own(dtype):
    weight = torch.randn(1024, 4096, device="cuda", dtype=dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(quantized(weight).weight, bnb.dequantize_4bit(codes, state))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_bf16_layers_follow_their_equation(kind):
    """Forward and gradients against float64 on the dequantized weight; bf16 rounds by up to 2^-9."""
    torch.manual_seed(0)
    o, i, r, x = 256, 512, 16, torch.randn(64, 512, device="cuda")
    base = quantized(torch.randn(o, i, device="cuda", dtype=torch.bfloat16))
    layer = kind(base, (o, i), r, 2.5 * r, 0.0, torch.float32)
    w, a = base.weight.double(), torch.randn(r, i, device="cuda") * 0.05
    b, change = torch.randn(o, r, device="cuda") * 0.05, torch.randn(o, device="cuda")
    layer.lora_A.data, layer.lora_B.data = a, b
    a, b, change = (t.double().requires_grad_() for t in (a, b, change))
    updated = w + 2.5 * b @ a
    if kind is DoRALinear:
        layer.squared_norm.data, layer.magnitude_change.data = (
            w.float().square().sum(1),
            change.detach().float(),
        )
        updated = (w.norm(dim=1) + change)[:, None] * updated / updated.norm(dim=1, keepdim=True).detach()
    expected, y = x.bfloat16().double() @ updated.T, layer(x.bfloat16())
    direction = torch.randn_like(expected)
    theirs = [a, b] + [change] * (kind is DoRALinear)
    ours = [layer.lora_A, layer.lora_B] + ([layer.magnitude_change] if kind is DoRALinear else [])
    pairs = [(y, expected)]
    pairs += zip(
        torch.autograd.grad(y, ours, direction.bfloat16()),
        torch.autograd.grad(expected, theirs, direction),
        strict=True,
    )
    for got, wanted in pairs:
        assert (got.double() - wanted).norm() / wanted.norm() < 1e-2


def run(args: list, out: Path, *launcher: str) -> list[dict]:
    command = [sys.executable, *launcher, "train.py", *map(str, args), "--output_dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.two_gpus
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize("train_type", ["full", "lora", "dora", "qlora", "bnb_dora"])
def test_two_gpus_equal_one(train_type, precision, tmp_path):
    """Five steps. In fp32 to 1e-4; in bf16 the micro-batches' padded shapes round differently: 2%."""
    model = tiny.save_checkpoint("llama", tmp_path / "model", torch.bfloat16)
    data = tiny.write_alpaca(tmp_path / "data.jsonl")
    args = ["--model_name", model, "--dataset", data, "--train_type", train_type, "--precision", precision]
    args += "--max_steps 5 --lr 1e-3 --log_to stdout --save_model false".split()
    one = run([*args, "--world_size", 1, "--batch_size", 4], tmp_path / "one")
    two = run([*args, "--world_size", 2, "--batch_size", 2], tmp_path / "two")
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5 * tolerance)  # a wrong factor is 2
        assert (a["tokens"], a["trained_tokens"]) == (b["tokens"], b["trained_tokens"])
    assert one[-1]["loss"] < one[0]["loss"]


@pytest.mark.two_gpus
@pytest.mark.parametrize("train_type", ["dora", "bnb_dora"])
def test_gathered_bytes_are_the_loaded_bytes(train_type, tmp_path):
    """Inside a gathered unit every parameter holds, bit for bit, what was loaded - in bf16 as well."""
    model = tiny.save_checkpoint("llama", tmp_path / "model", torch.bfloat16)
    data = tiny.write_alpaca(tmp_path / "data.jsonl")
    script = [__file__, str(model), str(data), train_type]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *script,
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _compare_gathered(model: str, data: str, train_type: str) -> None:
    from checkpoint import gather
    from launch import join_group
    from tests.runs import set_up

    place = join_group(*(int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    _, sharded = set_up(place, ["--model_name", model, "--dataset", data, "--train_type", train_type])
    for layer in sharded.get_submodule("model.layers"):
        random_bytes = {}
        for name, param in layer.named_parameters():
            if clean(name).endswith(("codes", "scales")):  # every bit pattern, NaNs of all types too
                noise = torch.randint(
                    0,
                    256,
                    (param.numel() * 4,),
                    dtype=torch.uint8,
                    generator=torch.Generator().manual_seed(1),
                )
                fill(param, noise.view(STORAGE).to(place.device))
            random_bytes[name] = gather(param)
        layer.unshard()
        for name, param in layer.named_parameters():
            assert torch.equal(param.cpu().view(torch.uint8), random_bytes[name].view(torch.uint8)), name
        layer.reshard()


if __name__ == "__main__":
    _compare_gathered(*sys.argv[1:])
