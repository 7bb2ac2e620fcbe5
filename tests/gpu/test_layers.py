"""Layers, optimizers and runs on GPUs: bf16, NCCL, paged memory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn

import train
from data.batches import StepSampler
from models.dora import DoRALinear
from models.family import unwrapped_name
from models.lora import LoRALinear
from monitoring.profiling import Profiler
from monitoring.tracking import NoTracker
from options.errors import UserError
from parallel.optimizers import make_optimizer
from parallel.shards import fill_shard
from quantization.hqq import HQQ
from quantization.layer import STORAGE
from quantization.nf4 import NF4
from tests.helpers import tiny
from tests.helpers.layers import quantized_like
from tests.helpers.programs import ROOT, run_and_read
from tests.helpers.runs import make_job
from training.out_of_memory import explain_out_of_memory


@pytest.mark.gpu
def test_storage_survives_the_copy_that_fsdp_makes():
    """Packed weights are stored as fp32, because this copy changes NaN patterns of 16-bit types."""
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
    assert torch.equal(quantized_like(weight).weight, bnb.dequantize_4bit(codes, state))


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [NF4(), HQQ(4), HQQ(3)])
@pytest.mark.parametrize("o, i, r", [(256, 512, 16), (1024, 256, 16), (1024, 256, 12)])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_bf16_layers_follow_their_equation(kind, o, i, r, quantizer):
    """Forward and gradients against float64 on the dequantized weight; bf16 rounds by up to 2^-9.

    The second shape's low-rank branch goes through the large matmul.
    """
    torch.manual_seed(0)
    x = torch.randn(64, i, device="cuda")
    base = quantized_like(torch.randn(o, i, device="cuda", dtype=torch.bfloat16), quantizer)
    layer = kind(base, (o, i), rank=r, scaling=2.5, dropout=0.0, dtype=torch.float32)
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


# (moments in 8 bits, moments in managed memory). The second parameter is too small for either, and the third,
# a vector, has 8-bit moments that are not paged.
BITSANDBYTES = {
    "adamw_8bit": (True, False),
    "paged_adamw_32bit": (False, True),
    "paged_adamw_8bit": (True, True),
}
SHAPES = [(512, 512), (32, 64), (8192,)]


def gpu_values(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return parameters (step 0), or the gradients of a step."""
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(s, generator=generator) + 0.2).to("cuda", dtype) for s in SHAPES]


def gpu_steps(optimizer, params, steps) -> list[torch.Tensor]:
    for step in steps:
        for p, gradient in zip(params, gpu_values(step, params[0].dtype), strict=True):
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in params]


def torch_adamw(params) -> torch.optim.Optimizer:
    """Return torch's AdamW with weight decay after the update, as in bitsandbytes' CUDA kernels."""
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0, fused=False, foreach=False)
    optimizer.register_step_post_hook(lambda *_: torch._foreach_mul_([p.data for p in params[:2]], 1 - 1e-3))
    return optimizer


def assert_follow(got, expected, before, tolerances: list[float]) -> None:
    """Compare parameters; errors are relative to how far each parameter has moved."""
    for a, b, start, tolerance in zip(got, expected, before, tolerances, strict=True):
        error = (a - b).float().norm() / (b - start).float().norm()
        assert error < tolerance, error


@pytest.mark.gpu
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_8bit_and_paged_adamw_follow_torch(name):
    eight, paged = BITSANDBYTES[name]
    reference = [nn.Parameter(v) for v in gpu_values(0)]
    expected = gpu_steps(torch_adamw(reference), reference, range(1, 11))
    params = [nn.Parameter(v) for v in gpu_values(0)]
    optimizer = make_optimizer(params, name, 1e-2, 0.1)
    got = gpu_steps(optimizer, params, range(1, 11))
    large = 0.03 if eight else 1e-4
    assert_follow(got, expected, gpu_values(0), [large, 1e-4, large])
    moments = [optimizer.state[p][k] for p in params for k in ("state1", "state2")]
    assert [m.dtype == torch.uint8 for m in moments] == [eight, eight, False, False, eight, eight]
    assert [getattr(m, "is_paged", False) for m in moments] == [paged, paged] + [False] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bf16_parameters_under_8bit_and_paged_adamw(name):
    """--precision bf16 against torch in fp32, with parameters rounded to bf16 after each step."""
    eight, _ = BITSANDBYTES[name]
    before = gpu_values(0, torch.bfloat16)
    reference = [nn.Parameter(v.float()) for v in before]
    adamw = torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.0)
    for step in range(1, 11):
        for p, gradient in zip(reference, gpu_values(step, torch.bfloat16), strict=True):
            p.grad = gradient.float()
        adamw.step()
        for p in reference:
            p.data = p.bfloat16().float()
    params = [nn.Parameter(v) for v in before]
    got = gpu_steps(make_optimizer(params, name, 1e-2, 0.0), params, range(1, 11))
    assert all(p.dtype == torch.bfloat16 for p in got)
    large = 0.08 if eight else 5e-3  # rounding in the other direction changes a value by 4e-3
    assert_follow(got, [p.detach() for p in reference], gpu_values(0, torch.bfloat16), [large, 5e-3, large])


@pytest.mark.gpu
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_state_is_restored_and_stays_paged(name):
    """Five steps, save and load, five more: the same as ten, and paged where it was."""
    _, paged = BITSANDBYTES[name]
    params = [nn.Parameter(v) for v in gpu_values(0)]
    expected = gpu_steps(make_optimizer(params, name, 1e-2, 0.1), params, range(1, 11))
    params, file = [nn.Parameter(v) for v in gpu_values(0)], io.BytesIO()
    optimizer = make_optimizer(params, name, 1e-2, 0.1)
    half = gpu_steps(optimizer, params, range(1, 6))
    torch.save(optimizer.state_dict(), file)
    params = [nn.Parameter(p) for p in half]
    optimizer = make_optimizer(params, name, 5e-2, 0.5)
    optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True))
    assert getattr(optimizer.state[params[0]]["state1"], "is_paged", False) == paged
    got = gpu_steps(optimizer, params, range(6, 11))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name, kind", [("fused_adamw", torch.optim.AdamW), ("fused_adam", torch.optim.Adam)])
def test_fused_is_unfused(name, kind):
    reference = [nn.Parameter(v) for v in gpu_values(0)]
    groups = [{"params": reference[:2], "weight_decay": 0.1}, {"params": reference[2:], "weight_decay": 0.0}]
    plain = kind(groups, lr=1e-2, fused=False, foreach=False)
    expected = gpu_steps(plain, reference, range(1, 11))
    params = [nn.Parameter(v) for v in gpu_values(0)]
    for a, b in zip(
        gpu_steps(make_optimizer(params, name, 1e-2, 0.1), params, range(1, 11)), expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def optimizer_run(tmp_path: Path, name: str, world_size: int, batch_size: int) -> list[dict]:
    """Run six fp32 steps of `full`; its 160 x 64 matrices and its embedding have 8-bit moments."""
    model = tmp_path / "model"
    if not model.exists():
        tiny.save_checkpoint("llama", model, torch.bfloat16)
        tiny.write_alpaca(tmp_path / "data.jsonl")
    args = ["--model_name", model, "--dataset", tmp_path / "data.jsonl", "--optimizer", name]
    args += ["--world_size", world_size, "--batch_size", batch_size]
    args += "--train_type full --precision fp32 --max_steps 6 --lr 1e-3 --wd 0.1".split()
    args += "--log_to stdout --save_model false".split()
    return run_and_read(args, tmp_path / f"{name}-{world_size}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_runs_follow_torch(name, tmp_path):
    """torch's AdamW is the fused one."""
    tolerance = 5e-3 if name.endswith("8bit") else 1e-4
    got, expected = (optimizer_run(tmp_path, n, 1, 4) for n in (name, "adamw"))
    for a, b in zip(got, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
    assert got[-1]["loss"] < 0.97 * got[0]["loss"]


@pytest.mark.two_gpus
@pytest.mark.parametrize("name", ["fused_adamw", *BITSANDBYTES])
def test_two_gpus_equal_one_under(name, tmp_path):
    """8-bit blocks are per shard, so two GPUs equal one up to 8-bit rounding."""
    tolerance = 5e-3 if name.endswith("8bit") else 1e-4
    one, two = (optimizer_run(tmp_path, name, world, 4 // world) for world in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)


@pytest.mark.two_gpus
@pytest.mark.parametrize(
    ("train_type", "precision"),
    [
        *product(["full", "lora", "dora", "qlora", "bnb_dora"], ["auto", "fp32", "bf16"]),
        *product(["hqq_lora", "hqq_dora", "llama_pro", "bnb_llama_pro", "hqq_llama_pro"], ["auto"]),
    ],
)
def test_two_gpus_equal_one(train_type, precision, tmp_path):
    """Five steps. fp32 to 1e-4; bf16 to 2%, since micro-batches of other padded shapes round differently."""
    kind = "llama_pro" if train_type.endswith("llama_pro") else "llama"
    model = tiny.save_checkpoint(kind, tmp_path / "model", torch.bfloat16)
    data = tiny.write_alpaca(tmp_path / "data.jsonl")
    args = ["--model_name", model, "--dataset", data, "--train_type", train_type, "--precision", precision]
    args += "--max_steps 5 --lr 1e-3 --log_to stdout --save_model false".split()
    one = run_and_read([*args, "--world_size", 1, "--batch_size", 4], tmp_path / "one")
    two = run_and_read([*args, "--world_size", 2, "--batch_size", 2], tmp_path / "two")
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5 * tolerance)  # a wrong factor is 2
        assert (a["tokens"], a["trained_tokens"]) == (b["tokens"], b["trained_tokens"])
    assert one[-1]["loss"] < one[0]["loss"]


@pytest.mark.two_gpus
@pytest.mark.parametrize("train_type", ["dora", "bnb_dora"])
def test_gathered_bytes_are_the_loaded_bytes(train_type, tmp_path):
    """Every parameter of a gathered unit is bitwise equal to the loaded one, in bf16 too."""
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
    from launch.ranks import join_process_group
    from parallel.shards import gather_to_cpu
    from tests.helpers.runs import set_up

    rank_info = join_process_group(*(int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    _, sharded = set_up(rank_info, ["--model_name", model, "--dataset", data, "--train_type", train_type])
    for layer in sharded.get_submodule("model.layers"):
        random_bytes = {}
        for name, param in layer.named_parameters():
            if unwrapped_name(name).endswith(("codes", "scales")):  # every bit pattern, NaNs of all types too
                noise = torch.randint(
                    0,
                    256,
                    (param.numel() * 4,),
                    dtype=torch.uint8,
                    generator=torch.Generator().manual_seed(1),
                )
                fill_shard(param, noise.view(STORAGE).to(rank_info.device))
            random_bytes[name] = gather_to_cpu(param)
        layer.unshard()
        for name, param in layer.named_parameters():
            assert torch.equal(param.cpu().view(torch.uint8), random_bytes[name].view(torch.uint8)), name
        layer.reshard()


if __name__ == "__main__":
    _compare_gathered(*sys.argv[1:])


@pytest.mark.gpu
def test_out_of_memory_is_explained(checkpoints, alpaca_file, one_rank):
    """The process may use less of a real GPU's memory than the batch's activations need."""
    options = [
        "--model_name",
        checkpoints(),
        "--dataset",
        alpaca_file,
        "--train_type",
        "lora",
        "--max_steps",
        "1",
    ]
    options += ["--batch_size", "40", "--context_length", "512", "--use_gradient_checkpointing", "false"]
    text = one_rank(run_in_little_memory, [*options, "--compile", "false"])[0]
    assert text.startswith("CUDA out of memory in the phase: "), text
    assert "Tried to allocate" in text and "load " in text.partition("Peak by phase: ")[2]
    assert text.count(" less)") == 3 and "--batch_size 1 --gradient_accumulation_steps 40" in text


def run_in_little_memory(rank_info, argv) -> str:
    job = make_job(rank_info, argv)
    whole = torch.cuda.get_device_properties(rank_info.device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / whole)
    try:
        explain_out_of_memory(start_of_a_run)(rank_info, job)
    except UserError as e:
        return str(e)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return "the memory sufficed"


def start_of_a_run(rank_info, job) -> None:
    profiler = Profiler(rank_info.device, [])
    config = job.config
    dealt = (
        job.rows,
        config.batch_size,
        config.gradient_accumulation_steps,
        rank_info.rank,
        rank_info.world,
        config.seed,
    )
    model, _ = train.set_up(job, rank_info, profiler)
    train.train(job, model, rank_info, StepSampler(*dealt), NoTracker(), profiler)
