"""Routed experts on a GPU: grouped matmuls, kernels of stacks, compilation, and a host that never waits."""

from __future__ import annotations

import shutil

import pytest
import torch

from launch.devices import grouped_matmul_runs_on
from quantization import grouped_operators
from quantization.hqq import HQQ
from quantization.layer import to_storage
from quantization.nf4 import NF4
from tests.helpers.compiled import CHECKPOINTED, compiled_on_gpu
from tests.helpers.expansion import edit_config
from tests.helpers.parity import PLAIN, arguments, assert_same
from tests.helpers.runs import train_run
from tests.helpers.stacked_experts import (
    ROUTINGS,
    E,
    add_adapters,
    make_list,
    make_routing,
    run_experts,
    stack_like,
)

pytestmark = pytest.mark.gpu
CUDA = "cuda"
QUANTIZERS = [NF4(), NF4(double=False), HQQ(4), HQQ(3), HQQ(8, 32)]


def test_the_kernel_takes_any_sizes():
    """Rows, features and experts that fill no block, experts without rows, and transposed weights."""
    from quantization.grouped_kernel import multiply, multiply_transposed

    generator = torch.Generator(CUDA).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=CUDA).half()

    for rows, inner, columns, counts in (
        (200, 48, 96, [70, 0, 64, 66, 0]),
        (3, 64, 64, [3]),
        (300, 33, 7, [100, 100, 100]),
        (5000, 256, 384, [0, 4999, 1, *[0] * 125]),
    ):
        offsets = torch.tensor(counts, device=CUDA).cumsum(0).int()
        x, grad, weights = random(rows, inner), random(rows, columns), random(len(counts), inner, columns)
        groups = zip(x.split(counts), grad.split(counts), weights, strict=True)
        expected = [(a.float() @ w.float(), b.float().t() @ a.float()) for a, b, w in groups]
        y, transposed = torch.cat([each[0] for each in expected]), torch.stack([each[1] for each in expected])
        for found in (multiply(x, weights, offsets), multiply(x, weights.mT.contiguous().mT, offsets)):
            torch.testing.assert_close(found.float(), y, rtol=2e-3, atol=2e-2)
        found = multiply_transposed(grad, x, offsets)
        torch.testing.assert_close(found.float(), transposed, rtol=2e-3, atol=2e-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (5, 64), (768, 2048)], ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_a_stack_is_dequantized_like_its_members(quantizer, shape, dtype):
    """Bit for bit. The weights of 5 x 64 fill neither a group of scales nor whole elements of the storage."""
    generator = torch.Generator(CUDA).manual_seed(0)
    weights = torch.randn(7, *shape, generator=generator, device=CUDA)
    packed = [quantizer.quantize(weight) for weight in weights]
    table = quantizer.table(torch.device(CUDA))
    alone = [quantizer.dequantize(*each, table, shape, dtype) for each in packed]
    codes, scales = (
        torch.stack([to_storage(each[i]) for each in packed]).view(torch.uint8) for i in range(2)
    )
    found = quantizer.dequantize_stack(codes, scales, table, shape, dtype)
    assert torch.equal(found, torch.stack(alone))


KERNELS = {"torch": (True, True), "triton": (False, True), "loop": (False, False)}


def by_kernel_and_looped(kernel: str, module, arguments, monkeypatch) -> list[list[torch.Tensor]]:
    """Return results and all gradients of a module by one of KERNELS, and by the loop."""
    if kernel == "torch" and not grouped_matmul_runs_on(torch.device(CUDA)):
        pytest.skip("torch has no grouped matmul for this GPU")
    results = []
    for by_torch, by_triton in (KERNELS[kernel], KERNELS["loop"]):
        module.zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr(grouped_operators, "runs_grouped", lambda *_, runs=by_torch: runs)
            patch.setattr(grouped_operators, "runs_in_triton", lambda *_, runs=by_triton: runs)
            found = run_experts(module, *arguments)
        results.append(found + [p.grad.clone() for p in module.parameters() if p.requires_grad])
    return results


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("case", ROUTINGS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("quantizer", [None, NF4(), HQQ(4)], ids=str)
def test_grouped_matmuls_are_the_loop(quantizer, biased, case, kernel, monkeypatch):
    """In bf16, up to rounding, with square weights too; None: dense experts that are trained."""
    for mlp in (48, 64):
        experts = make_list(mlp, biased).to(torch.bfloat16)
        _, stacked = stack_like(experts, quantizer, torch.bfloat16, CUDA)
        stacked.requires_grad_(quantizer is None)
        x, index, weights = (t.to(CUDA) for t in make_routing(case))
        arguments = x.bfloat16(), index, weights.bfloat16()
        for a, b in zip(*by_kernel_and_looped(kernel, stacked, arguments, monkeypatch), strict=True):
            assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm() + 1e-6


def test_idle_experts_get_zeros():
    _, stacked = stack_like(make_list().to(torch.bfloat16), None, torch.bfloat16, CUDA)
    x, index, weights = (t.to(CUDA) for t in make_routing("idle"))
    run_experts(stacked, x.bfloat16(), index, weights.bfloat16())
    for stack in (stacked.gate_up, stacked.down):
        assert not stack.weight.grad[E - 1].any() and stack.weight.grad[: E - 1].any()
        assert stack.weight.grad.isfinite().all()


@pytest.mark.parametrize("quantizer", [None, NF4()], ids=str)
def test_the_host_does_not_wait(quantizer):
    _, stacked = stack_like(make_list().to(torch.bfloat16), quantizer, torch.bfloat16, CUDA)
    x, index, weights = (t.to(CUDA) for t in make_routing("idle"))
    arguments = x.bfloat16(), index, weights.bfloat16()
    run_experts(stacked, *arguments)  # kernels are compiled, and constants made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_experts(stacked, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("quantizer", [None, NF4(), HQQ(4)], ids=str)
def test_compiled_experts_are_the_same(quantizer):
    """One graph, and one more for another number of tokens; results up to rounding."""
    torch.compiler.reset()
    _, stacked = stack_like(make_list().to(torch.bfloat16), quantizer, torch.bfloat16, CUDA)
    compiled = torch.compile(stacked, fullgraph=True)
    for tokens in (40, 24, 56):
        x, index, weights = (t.to(CUDA) for t in make_routing("random", tokens=tokens))
        arguments = x.bfloat16(), index, weights.bfloat16()
        for a, b in zip(run_experts(compiled, *arguments), run_experts(stacked, *arguments), strict=True):
            assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()


@pytest.mark.parametrize("kind", ["fp16", "fp32"])
def test_other_dtypes(kind):
    """fp16 takes the Triton kernel, and fp32 the loop."""
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[kind]
    original, stacked = stack_like(make_list().to(dtype), NF4(), dtype, CUDA)
    x, index, weights = (t.to(CUDA) for t in make_routing("random"))
    arguments = x.to(dtype), index, weights.to(dtype)
    for a, b in zip(run_experts(original, *arguments), run_experts(stacked, *arguments), strict=True):
        assert (a.float() - b.float()).norm() <= 5e-3 * b.float().norm()


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("quantizer", [None, NF4()], ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_grouped_matmuls_are_those_of_the_loop(kind, quantizer, rank, kernel, monkeypatch):
    """In bf16, up to rounding; the operators take a rank of 3 after padding."""
    experts = add_adapters(kind, make_list().to(torch.bfloat16), quantizer, CUDA, rank)
    x, index, weights = (t.to(CUDA) for t in make_routing("idle"))
    arguments = x.bfloat16(), index, weights.bfloat16()
    for a, b in zip(*by_kernel_and_looped(kernel, experts, arguments, monkeypatch), strict=True):
        assert (a.float() - b.float()).norm() <= 2e-2 * b.float().norm()
    for stack in (experts.gate_up, experts.down):
        assert not stack.lora_B.grad[E - 1].any() and stack.lora_B.grad[: E - 1].any()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_host_does_not_wait_for_adapters(kind):
    experts = add_adapters(kind, make_list().to(torch.bfloat16), NF4(), CUDA)
    x, index, weights = (t.to(CUDA) for t in make_routing("idle"))
    arguments = x.bfloat16(), index, weights.bfloat16()
    run_experts(experts, *arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_experts(experts, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("more", ["", "--lora_expert_rank 4"])
@pytest.mark.parametrize("train_type", ["qlora", "bnb_dora", "full"])
def test_compiled_runs(train_type, more, checkpoints, even_rows, one_rank):
    """Layers with experts are compiled, checkpointed, without a break; in fp32, where experts loop."""
    if more and train_type == "full":
        pytest.skip("full has no adapters")
    args = arguments(checkpoints("qwen3_moe"), even_rows, train_type, *more.split())
    args += ["--optimizer", "sgd", "--lr", "0.1"]
    plain = one_rank(train_run, [*args, *PLAIN])[0]
    assert_same(plain, one_rank(compiled_on_gpu, [*args, *CHECKPOINTED])[0][0])


@pytest.mark.parametrize("more", ["", "--lora_expert_rank 4"])
def test_compiled_runs_in_bf16_learn(more, checkpoints, even_rows, one_rank):
    """Grouped matmuls, compiled. Later steps may differ: rounding sends tokens to other experts."""
    args = arguments(checkpoints("qwen3_moe"), even_rows, "qlora", *more.split(), "--precision", "auto")
    plain, _, _ = one_rank(train_run, [*args, *PLAIN])[0]
    losses, _, _ = one_rank(compiled_on_gpu, [*args, *CHECKPOINTED])[0][0]
    assert losses[0] == pytest.approx(plain[0], rel=2e-2) and losses[-1] < losses[0]


@pytest.mark.parametrize("train_type", ["lora", "qlora"])
def test_compiled_routers_with_an_auxiliary_loss(train_type, checkpoints, even_rows, one_rank, tmp_path):
    folder = shutil.copytree(checkpoints("qwen3_moe"), tmp_path / "model")
    edit_config(folder, output_router_logits=True, router_aux_loss_coef=0.5)
    args = arguments(folder, even_rows, train_type, "--optimizer", "sgd", "--lr", "0.1")
    args += ["--train_router", "true"]
    plain = one_rank(train_run, [*args, *PLAIN])[0]
    assert_same(plain, one_rank(compiled_on_gpu, [*args, *CHECKPOINTED])[0][0])
