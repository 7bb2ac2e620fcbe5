"""Attention as on a T4: by the memory-efficient kernel alone, on any GPU (benchmarks/turing.py)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from benchmarks.turing import as_turing_gpu
from models.attention import attend_fused, takes_grouped_heads
from models.family import FUSED
from tests.helpers.parity import arguments
from tests.helpers.runs import train_run

HEADS, KEY_HEADS, TOKENS, FEATURES = 32, 8, 4096, 128


class Grouped(nn.Module):
    """What transformers' attention reads of a layer's attention module."""

    is_causal = True
    num_key_value_groups = HEADS // KEY_HEADS


def make_heads(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return query [1, 32, length, 128], and key and value [1, 8, 4096, 128], which take gradients."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((HEADS, length), (KEY_HEADS, TOKENS), (KEY_HEADS, TOKENS))
    return [
        torch.randn(1, *shape, FEATURES, dtype=dtype, device="cuda", generator=generator).requires_grad_()
        for shape in shapes
    ]


def masked(length: int, kind: str) -> torch.Tensor | None:
    """Return no mask, or one of two packed rows: [1, 1, length, 4096]."""
    if kind == "causal":
        return None
    query, key = (
        torch.arange(TOKENS - length, TOKENS, device="cuda")[:, None],
        torch.arange(TOKENS, device="cuda"),
    )
    return ((query >= key) & ((query < 1000) == (key < 1000)))[None, None]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["causal", "packed"])
@pytest.mark.parametrize("length", [TOKENS, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_scores_are_held(dtype, length, kind):
    """Result and gradients are the math kernel's in float64; the peak leaves no room for the scores."""
    inputs, mask = make_heads(length, dtype), masked(length, kind)
    upstream = torch.randn(1, length, HEADS, FEATURES, dtype=dtype, device="cuda")
    with as_turing_gpu():
        assert not takes_grouped_heads("cuda", dtype, FEATURES)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got, _ = attend_fused(Grouped(), *inputs, mask, scaling=FEATURES**-0.5)
        gradients = torch.autograd.grad(got, inputs, upstream)
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < HEADS * TOKENS**2 * dtype.itemsize / 2, f"{peak / 2**30:.2f} GiB"
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        expected, _ = attend_fused(Grouped(), *exact, mask, scaling=FEATURES**-0.5)
        exact_gradients = torch.autograd.grad(expected, exact, upstream.double())
    rounding = {torch.float16: 2e-3, torch.float32: 2e-5}[dtype]
    for mine, theirs in zip((got, *gradients), (expected, *exact_gradients), strict=True):
        assert ((mine.double() - theirs).norm() / theirs.norm()).item() < rounding


@pytest.mark.gpu
def test_fp32_takes_the_fused_kernel_on_every_gpu():
    """PyTorch's flash and cuDNN kernels are for 16 bits."""
    assert not takes_grouped_heads("cuda", torch.float32, FEATURES)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        attend_fused(Grouped(), *make_heads(TOKENS, torch.float32), None, scaling=FEATURES**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [0, 4])
def test_generation_needs_no_math_kernel(padding, checkpoints):
    """The first two tokens' logits, of the prompt and of a token after it, are those of the unlimited GPU."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints("llama"), attn_implementation=FUSED, dtype=torch.float16
    ).cuda()
    ids = torch.randint(3, 100, (2, 24), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    asked |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    free = model.generate(ids, **asked).logits
    with as_turing_gpu():
        limited = model.generate(ids, **asked).logits
    torch.testing.assert_close(limited, free, rtol=1e-2, atol=1e-2)


def fifty_steps(rank_info, args: list) -> tuple:
    with as_turing_gpu():
        return train_run(rank_info, args)


@pytest.mark.gpu
def test_fp16_skips_no_step_by_surprise(checkpoints, alpaca_file, one_rank):
    """50 steps: only the loss scaler's first steps, which look for its scale, may be without gradients."""
    args = arguments(checkpoints(), alpaca_file, "bnb_dora", "--batch_size", "2", "--max_steps", "50")
    losses, _, norms = one_rank(fifty_steps, [*args, "--num_epochs", "50", "--precision", "fp16_autocast"])[0]
    assert len(losses) == 50 and torch.tensor(losses).isfinite().all()
    assert torch.tensor(norms)[4:].isfinite().all() and losses[-1] < losses[0]
