"""fp16 with activations beyond its largest number, as in Gemma: nothing overflows under autocast."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.debugging import aot_eager

from models.registry import read_config
from models.wide_linears import widen_linears
from options.errors import UserError
from tests.helpers.auto_classes import load_transformers_model
from tests.helpers.logits import IDS
from tests.helpers.parity import arguments
from tests.helpers.resuming import run
from tests.helpers.runs import train_run

# {what overflows: (parts of the names of the tensors that are scaled, factor)}. None: the norms behind
# attention and MLP.
PLACES = {
    "residual stream": (None, 40_000),
    "embeddings": ((".embed_tokens.",), 300_000),
    "projections": ((".o_proj.", ".down_proj."), 60_000),
    "product of gate and up": ((".gate_proj.", ".up_proj."), 300),
}
GEMMA_PLACES = ("residual stream", "projections", "product of gate and up")
SLOW = [
    *((kind, place, "bnb_dora", 200) for kind in ("gemma2", "gemma3") for place in GEMMA_PLACES),
    *((kind, "residual stream", "bnb_dora", 200) for kind in ("olmo2", "olmo3", "exaone4", "glm4")),
    ("nemotron", "embeddings", "bnb_dora", 200),
    *(("gemma3", place, "lora", 20) for place in GEMMA_PLACES),
    ("olmo2", "residual stream", "lora", 60),
    ("olmo2", "residual stream", "full", 60),
]


def save_overflowing(checkpoint: Path, folder: Path, place: str) -> Path:
    """Copy a checkpoint with larger weights in one of PLACES."""
    parts, factor = PLACES[place]
    norms = dict(read_config(checkpoint)[1].identity_init)
    parts = [f".{name}." for name in norms] if parts is None else parts
    one = -norms[next(iter(norms))] if PLACES[place][0] is None else 0  # Gemma's norms multiply by 1 + weight
    shutil.copytree(checkpoint, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if any(part in name for part in parts):
                tensors[name] = (one + tensors[name]) * factor - one
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_wide_linear_is_exact():
    """For inputs of any size: as exact as the linear in fp16 is for small ones, each token by itself."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False)).requires_grad_(False)
    x = torch.randn(6, 64) * torch.tensor([1e-4, 0.1, 1.0, 1e3, 1e6, 1e15])[:, None]
    expected = x.double() @ model[0].weight.double().t()
    widen_linears(model, ["0"])
    with torch.autocast("cpu", dtype=torch.float16):
        y = model(x)
        assert y.dtype == torch.float32
        assert torch.equal(y[4], model(x[4]))
    errors = (y - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors[1:].max() < 1e-3 and errors[0] < 1e-2  # 1e-4 is near fp16's smallest numbers
    assert ((model(x) - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-6  # in fp32


def test_wide_linears_of_a_kind_share_a_compilation():
    """Compiled by AOTAutograd: the same results and gradients as without, and one graph for two linears."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(2)))
    widen_linears(model, ["0", "1"])
    run = torch.compile(lambda linear, x: linear(x), backend=count, fullgraph=True)
    x = (torch.randn(6, 64) * 1e6).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        for linear in model:
            plain, compiled = linear(x), run(linear, x)
            torch.testing.assert_close(compiled, plain, rtol=0, atol=0)
            inputs = x, linear.weight
            upstream = torch.full_like(plain, 1e-6)
            gradients = [torch.autograd.grad(y, inputs, upstream) for y in (compiled, plain)]
            torch.testing.assert_close(*gradients)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("kind", "place", "train_type", "steps"),
    [
        ("gemma3_wrapper", "product of gate and up", "bnb_dora", 4),
        ("olmo2", "residual stream", "bnb_dora", 4),
        ("nemotron", "embeddings", "bnb_dora", 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_no_step_is_bad(kind, place, train_type, steps, checkpoints, short_rows, one_rank, tmp_path):
    """transformers' plain fp16 is NaN with these weights; under autocast the losses are those of fp32."""
    overflowing = save_overflowing(checkpoints(kind), tmp_path / kind, place)
    with torch.no_grad():
        plain = load_transformers_model(overflowing, dtype=torch.float16)(input_ids=IDS)
    assert plain.logits.isnan().any()
    args = arguments(overflowing, short_rows, train_type)
    args += ["--max_steps", str(steps), "--num_epochs", "100", "--batch_size", "2", "--context_length", "64"]
    fp16, fp32 = (one_rank(train_as_on_gpu, [*args, "--precision", p])[0] for p in ("fp16_autocast", "fp32"))
    assert len(fp16[0]) == steps and all(map(math.isfinite, fp16[0]))
    assert all(tensor.isfinite().all() for tensor in fp16[1].values())
    assert fp16[0][0] == pytest.approx(fp32[0][0], rel=1e-3)
    ends = [torch.tensor(losses[-20:]).mean().item() for losses in (fp16[0], fp32[0])]
    assert ends[0] == pytest.approx(ends[1], rel=0.03)


def train_as_on_gpu(rank_info, argv: list[str]):
    """Call `train_run` where torch.is_autocast_enabled() means the device in use, as on a GPU; not CUDA."""
    original = torch.is_autocast_enabled
    with mock.patch("torch.is_autocast_enabled", lambda device="cpu": original(device)):
        return train_run(rank_info, argv)


def test_an_overflow_elsewhere_ends_in_a_line(checkpoints, short_rows, one_rank, tmp_path):
    """Llama's product of gate and up stays in fp16."""
    overflowing = save_overflowing(checkpoints("llama"), tmp_path / "model", "product of gate and up")
    args = [*arguments(overflowing, short_rows, "qlora"), "--precision", "fp16_autocast", "--max_steps", "2"]
    error = one_rank(error_of_run, [*map(str, args), "--output_dir", str(tmp_path / "run")])[0]
    assert error.startswith("none of 2 steps had a finite loss and gradient; of the last one, nan and ")
    assert "fp16, whose largest number is 65,504, overflows" in error
    assert "try --precision fp32, or bf16 on a GPU that has it" in error and "\n" not in error


def error_of_run(rank_info, argv: list[str]) -> str:
    with pytest.raises(UserError) as e:
        run(rank_info, argv)
    return str(e.value)
