"""torch's variable-length attention: against its definition and the fallback, compiled, and in full runs.

tests/data/test_packing.py tests the fallback itself, and the positions of rows in a batch.
"""

from __future__ import annotations

import pytest
import torch

from data.packing import PackSampler
from data.prefetch import PrefetchedSteps
from launch.memory import try_page_locking
from launch.precision import detect_precision
from models import attention
from models.attention import attend_within_rows
from models.family import VARLEN
from models.varlen import has_varlen
from tests.helpers.compiled import compiled_on_gpu
from tests.helpers.packing import (
    loss_and_gradients,
    packed_batch,
    packing_arguments,
    padded_batch,
    reference_attention,
)
from tests.helpers.parity import arguments
from tests.helpers.runs import set_up, train_run
from tests.helpers.token_rows import make_token_rows

# Relative error of a whole tensor: about twice what rounding of inputs and probabilities makes of it.
ROUNDING = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
HEADS, GROUPS = 4, 2


@pytest.fixture
def kernel():
    """Skip a test on GPUs before Ampere, which lack variable-length attention."""
    if not has_varlen():
        pytest.skip("needs a GPU that has variable-length attention")


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


def heads_of(features: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Return query, key, value like transformers, [B, heads, T, D], and a gradient [B, T, heads, D]."""
    lines, length = packed_batch().ids.shape
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"device": "cuda", "dtype": dtype, "generator": generator}
    made = [
        torch.randn(lines, length, heads, features, **options) for heads in (HEADS, GROUPS, GROUPS, HEADS)
    ]
    return [t.transpose(1, 2).requires_grad_() for t in made[:3]] + made[3:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("features, window", [(16, None), (64, 16), (128, None), (128, 16), (256, 16)])
def test_the_kernel_computes_its_definition(features, window, dtype, kernel, monkeypatch):
    """Forward and gradients in float64, with padding and empty rows."""
    batch = packed_batch()
    *inputs, upstream = heads_of(features, dtype, seed=0)
    given = {"scaling": features**-0.5, "sliding_window": window, "max_length_q": batch.longest}
    module = torch.nn.Identity()
    got, _ = attend_within_rows(module, *inputs, None, cu_seq_lens_q=batch.bounds.cuda(), **given)
    got.backward(upstream)
    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    monkeypatch.setattr(attention, "varlen_attn", reference_attention)
    expected, _ = attend_within_rows(module, *exact, None, cu_seq_lens_q=batch.bounds, **given)
    expected.backward(upstream.double().cpu())
    assert apart(got, expected) < ROUNDING[dtype]
    for mine, theirs in zip(inputs, exact, strict=True):
        assert apart(mine.grad, theirs.grad) < ROUNDING[dtype]


@pytest.mark.gpu
def test_lines_that_are_not_packed_are_rows(kernel):
    """In evaluation: against PyTorch's causal attention."""
    *inputs, _ = heads_of(64, torch.bfloat16, seed=1)
    got, _ = attend_within_rows(torch.nn.Identity(), *inputs, None, scaling=0.125)
    q, k, v = (t.float() for t in inputs)
    k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125)
    assert apart(got, expected.transpose(1, 2)) < ROUNDING[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16_autocast"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"])
def test_models_follow_the_fallback(kind, precision, checkpoints, alpaca_file, one_rank, kernel):
    """Loss and gradients. No families with routed experts: rounding sends tokens to other experts."""
    args = arguments(checkpoints(kind), alpaca_file, "bnb_dora", "--packing", "true")
    args += ["--precision", precision, "--compile", "false"]
    used, ours, fallback, leaking = one_rank(losses_and_gradients, args)[0]
    assert used == VARLEN
    assert ours[0] == pytest.approx(fallback[0], rel=2e-3)
    assert apart(ours[1], fallback[1]) < 0.1
    assert apart(leaking[1], fallback[1]) > 0.5, "rows that see one another would not show"


def losses_and_gradients(rank_info, args) -> tuple:
    """Return the attention that a packed run uses, and (loss, all gradients) by three kinds of attention.

    These are the run's own attention, the fallback, and causal attention that ignores rows.
    """
    job, model = set_up(rank_info, args)
    used, packed = model.config._attn_implementation, packed_batch()
    leaking = type(packed)(packed.ids, packed.targets)

    def once(batch) -> tuple[float, torch.Tensor]:
        loss, gradients = loss_and_gradients(
            model, batch, detect_precision(job.config.precision).context(rank_info.device.type)
        )
        return loss, torch.cat([g.flatten() for g in gradients.values()])

    ours = once(packed)
    model.set_attn_implementation("sdpa")
    return used, ours, once(packed), once(leaking)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_lines_beyond_a_window_follow_the_masks(kind, checkpoints, alpaca_file, one_rank, kernel):
    """Not packed: loss and gradients; a compiled run with lines of several lengths equals a plain one."""
    args = [*arguments(checkpoints(kind), alpaca_file, "bnb_dora"), "--precision", "auto"]
    used, ours, masked = one_rank(both_ways, [*args, "--compile", "false"])[0]
    assert used == VARLEN
    assert ours[0] == pytest.approx(masked[0], rel=2e-3)
    assert apart(ours[1], masked[1]) < 0.1
    compiled = one_rank(train_run, [*args, "--compile", "true"])[0]
    plain = one_rank(train_run, [*args, "--compile", "false"])[0]
    torch.testing.assert_close(torch.tensor(compiled[0]), torch.tensor(plain[0]), rtol=2e-2, atol=0)
    torch.testing.assert_close(torch.tensor(compiled[2]), torch.tensor(plain[2]), rtol=1e-1, atol=0)


def both_ways(rank_info, args) -> tuple:
    """Return the attention that a run uses, and (loss, all gradients) by it and by transformers' masks."""
    _, model = set_up(rank_info, args)
    used, found = model.config._attn_implementation, []
    for name in (used, "sdpa"):
        model.set_attn_implementation(name)
        loss, gradients = loss_and_gradients(
            model, padded_batch(), detect_precision("auto").context(rank_info.device.type)
        )
        found.append((loss, torch.cat([g.flatten() for g in gradients.values()])))
    return used, *found


@pytest.mark.gpu
def test_it_compiles_once_and_never_waits_for_the_gpu(kernel):
    batch, module = packed_batch(), torch.nn.Identity()
    attend = torch.compile(attend_within_rows, fullgraph=True)
    longest = batch.longest
    # The same number of bounds elsewhere: rows of 40, 37, ... tokens.
    others = torch.tensor([0, 40, 77, 100, 154, 160, 200, 231, 231, 231, 231, 231], dtype=torch.int32)
    assert len(others) == len(batch.bounds)

    def step(function, bounds: torch.Tensor, inputs: list) -> torch.Tensor:
        given = {"scaling": 0.125, "cu_seq_lens_q": bounds, "max_length_q": longest}
        result, _ = function(module, *inputs[:3], None, **given)
        result.backward(inputs[3])
        return result

    bounds, inputs = (
        [b.cuda() for b in (batch.bounds, others)],
        [heads_of(64, torch.bfloat16, s) for s in (0, 1)],
    )
    step(attend, bounds[0], inputs[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = step(attend, bounds[1], inputs[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = step(attend_within_rows, bounds[1], heads_of(64, torch.bfloat16, 1))
    assert apart(got, expected) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "fp16_autocast"])
def test_a_run_learns_what_it_learns_unpacked(precision, checkpoints, alpaca_file, one_rank):
    """All steps of an epoch have the same rows. GPUs before Ampere use the fallback."""
    args = [*packing_arguments(checkpoints(), alpaca_file, 2), "--gradient_accumulation_steps", "2"]
    args += ["--precision", precision, "--compile", "false"]
    packed = one_rank(train_run, [*args, "--batch_size", "4"])[0]
    padded = one_rank(train_run, [*args, "--packing", "false", "--batch_size", "6"])[0]
    torch.testing.assert_close(torch.tensor(packed[0]), torch.tensor(padded[0]), rtol=2e-2, atol=0)
    torch.testing.assert_close(torch.tensor(packed[2]), torch.tensor(padded[2]), rtol=1e-1, atol=0)


@pytest.mark.gpu
def test_compiled_layers_are_compiled_for_one_shape(checkpoints, alpaca_file, one_rank, kernel):
    """The second step, with other packs, compiles nothing. The result equals that of plain layers."""
    args = [*packing_arguments(checkpoints(), alpaca_file, 2), "--precision", "auto", "--batch_size", "4"]
    args += ["--gradient_accumulation_steps", "2"]
    _, after_one = one_rank(compiled_on_gpu, [*args, "--max_steps", "1"])[0]
    compiled, after_two = one_rank(compiled_on_gpu, args)[0]
    assert after_one == after_two > 0
    plain = one_rank(train_run, [*args, "--compile", "false"])[0]
    torch.testing.assert_close(torch.tensor(compiled[0]), torch.tensor(plain[0]), rtol=2e-2, atol=0)
    torch.testing.assert_close(torch.tensor(compiled[2]), torch.tensor(plain[2]), rtol=1e-1, atol=0)


@pytest.mark.gpu
def test_batches_come_in_pinned_memory():
    with try_page_locking([2**20]) as allowed:
        pass
    if not allowed:
        pytest.skip("this system grants no page-locked memory")
    device = torch.device("cuda", 0)
    steps = list(
        PrefetchedSteps(PackSampler(make_token_rows(40), 2, 1, 0, 1, 42, 29).steps(1), device, pin=True)
    )
    plain = list(PackSampler(make_token_rows(40), 2, 1, 0, 1, 42, 29).steps(1))
    for ours, theirs in zip(steps, plain, strict=True):
        for pinned, batch in zip(ours.batches, theirs.batches, strict=True):
            for name in ("ids", "targets", "positions", "bounds"):
                assert getattr(pinned, name).is_pinned()
                assert torch.equal(getattr(pinned.to(device), name).cpu(), getattr(batch, name))
