"""HQQ, offload and fp16 on a GPU: kernels, and that offload frees memory.

tests/test_matrix.py compares every train type and option on GPUs too, over NCCL.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from benchmarks.turing import as_turing_gpu
from data.batches import Step
from files import tensors as tensor_files
from files.tensors import PinnedBuffers, list_tensors, read_tensor
from models.loss import look_up_rows
from monitoring.metrics import Meter
from options.methods import HQQ_BITS
from parallel.activation_offload import HostActivations, OffloadedLayer
from quantization.hqq import HQQ
from tests.helpers.compiled import compiled_on_gpu
from tests.helpers.layers import quantized_like
from tests.helpers.parity import arguments, biased_checkpoint, follows
from tests.helpers.resuming import NOISY, Signals, adapter, lines, repeatable_metrics, run
from tests.helpers.runs import dense_state, set_up, train_run


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_bits", HQQ_BITS)
@pytest.mark.parametrize(("shape", "block"), [((96, 128), 64), ((5, 24), 8), ((70, 1000), 200)])
def test_hqq_is_dequantized_as_on_the_cpu(n_bits, dtype, shape, block):
    """The GPU's kernel is bitwise equal to the CPU's plain operations, with row scales too."""
    quantizer = HQQ(n_bits, block)
    codes, scales = quantizer.quantize(torch.randn(shape) * 0.05)
    for rows in (None, torch.rand(shape[0]) + 0.5):
        expected = quantizer.dequantize(codes, scales, None, shape, dtype, rows)
        on_gpu = [t if t is None else t.cuda() for t in (codes, scales, None)]
        got = quantizer.dequantize(*on_gpu, shape, dtype, rows if rows is None else rows.cuda())
        assert torch.equal(got.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("features", [64, 1000, 4096])
def test_a_gpu_looks_up_rows_in_host_memory(features):
    """By a kernel if the memory is pinned, otherwise by the host; bitwise equal rows."""
    rows, index = torch.randn(50, features).bfloat16(), torch.randint(0, 50, (3001,), device="cuda")
    here = torch.rand(3001, device="cuda") > 0.5
    expected = rows.cuda()[index]
    for where in (rows, rows.pin_memory()):
        assert torch.equal(look_up_rows(where, index), expected)
        assert torch.equal(look_up_rows(where, index, here), expected * here[:, None])


@pytest.mark.gpu
def test_a_reading_waits_for_nothing(one_rank):
    """The host queues the fused optimizer's step while the GPU computes the gradient."""
    one_rank(read_without_waiting)


def read_without_waiting(rank_info) -> None:
    step, numbers = (
        Step(0.1, [], 1, 1, torch.zeros(0)),
        [torch.ones((), device=rank_info.device) for _ in range(2)],
    )
    meter = Meter(rank_info.device, {"forward": 5, "backward": 6})
    meter.read(1, step, 1e-4, *numbers)  # creates the communicator and the pinned memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        began = time.perf_counter()
        meter.restart()
        torch.cuda._sleep(10**9)  # cycles, half a second
        reading, lap = meter.read(2, step, 1e-4, *numbers), meter.lap()
        queued = time.perf_counter() - began
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (reading.loss(), reading.grad_norm(), reading.finite.item()) == (1, 1, True)
    waited = time.perf_counter() - began
    assert queued < 0.1 < waited * 0.9 < lap.seconds() < waited * 1.1, "the step's time is the GPU's"


@pytest.mark.gpu
def test_the_loop_waits_only_for_a_reading(checkpoints, alpaca_file, one_rank, tmp_path):
    """Between steps too. It waits for an event, which torch's sync debug mode does not report."""
    options = ["--max_steps", "5", "--precision", "auto", "--output_dir", str(tmp_path)]
    one_rank(steps_without_waiting, [*arguments(checkpoints("llama"), alpaca_file, "bnb_dora"), *options])


def steps_without_waiting(rank_info, argv: list[str]) -> None:
    """Raise in synchronizing calls, except in the first two steps, which allocate and compile."""

    def measure_and_set_mode(self, reading, lap):
        torch.cuda.set_sync_debug_mode("error" if 2 <= reading.index < 5 else "default")
        return measure(self, reading, lap)

    measure, Meter.measure = Meter.measure, measure_and_set_mode
    try:
        train_run(rank_info, argv)
    finally:
        Meter.measure = measure
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind, on_host", [("llama", True), ("qwen2", False)])
def test_only_an_embedding_that_nothing_else_needs_is_on_the_host(
    kind, on_host, checkpoints, alpaca_file, one_rank
):
    """qwen2's embedding is also its head."""
    args = arguments(checkpoints(kind), alpaca_file, "qlora")
    assert one_rank(embedding_device, args)[0] == ("cpu" if on_host else "cuda", on_host)


def embedding_device(rank_info, args) -> tuple[str, bool]:
    weight = set_up(rank_info, args)[1].get_submodule("model.embed_tokens").weight
    return weight.device.type, weight.is_pinned()


@pytest.mark.gpu
@pytest.mark.parametrize("mib", [0.5, 7, 8, 64.5])
def test_a_tensor_is_copied_to_the_gpu_in_chunks(mib, tmp_path, monkeypatch):
    """Even a tensor larger than the buffers, while the GPU is busy: no chunk is overwritten too early."""
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 2**20)
    tensors = {
        name: torch.randint(2**31, (int(mib * 2**18),), dtype=torch.int32).view(torch.bfloat16)
        for name in "ab"
    }
    save_file(tensors, tmp_path / "file")
    stage, device = PinnedBuffers("cuda"), torch.device("cuda")
    for name, stored in list_tensors(tmp_path / "file").items():
        torch.cuda._sleep(10**8)
        found = read_tensor(tmp_path, stored, stage).to(device)
        assert torch.equal(found.view(torch.int32).cpu(), tensors[name].view(torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("train_type", ["full", "qlora"])
def test_a_checkpoint_loads_in_chunks(train_type, checkpoints, alpaca_file, one_rank):
    """Many chunks of every tensor, by several threads."""
    folder = checkpoints("llama_bias")
    found = one_rank(loaded_in_chunks, arguments(folder, alpaca_file, train_type))[0]
    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        packed = train_type == "qlora" and "_proj.weight" in name
        expected = quantized_like(tensor.cuda()).weight.cpu() if packed else tensor
        assert torch.equal(found[name].cpu(), expected), name


def loaded_in_chunks(rank_info, args) -> dict[str, torch.Tensor]:
    original = tensor_files.CHUNK_BYTES, tensor_files.CHUNK_COUNT
    tensor_files.CHUNK_BYTES, tensor_files.CHUNK_COUNT = 100, 3
    try:
        return dense_state(rank_info, args)
    finally:
        tensor_files.CHUNK_BYTES, tensor_files.CHUNK_COUNT = original


class Block(nn.Module):
    def __init__(self, depth: int = 1):
        super().__init__()
        self.linear, self.depth = nn.Linear(256, 256), depth

    def forward(self, x):
        for _ in range(self.depth):
            x = x + torch.tanh(self.linear(x))
        return x


def offloaded(blocks: list[nn.Module]) -> list[OffloadedLayer]:
    host_activations, last = HostActivations(), len(blocks) - 1
    return [
        OffloadedLayer(
            block,
            host_activations,
            offload_input=True,
            offload_last_output=False,
            first=i == 0,
            last=i == last,
        )
        for i, block in enumerate(blocks)
    ]


def run_blocks(offload: bool) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Return (output, gradients, peak bytes) of 32 checkpointed blocks with inputs of 8 MiB each."""
    torch.manual_seed(0)
    blocks = [checkpoint_wrapper(Block().cuda()) for _ in range(32)]
    model = nn.Sequential(*(offloaded(blocks) if offload else blocks))
    for _ in range(2):  # the second time, pinned memory and streams exist
        model.zero_grad()
        x = torch.randn(8192, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = model(x.requires_grad_())
        y.square().mean().backward()
        peak = torch.cuda.max_memory_allocated() - before
    return y.detach(), [p.grad.clone() for p in model.parameters()], peak


@pytest.mark.gpu
def test_activation_offload_changes_memory_only():
    y, gradients, peak = run_blocks(offload=False)
    other, others, lower = run_blocks(offload=True)
    assert torch.equal(y, other)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert peak > 32 * 2**23 > 2 * lower


def covered_by_kernels(model: nn.Module, x: torch.Tensor, trace: Path) -> dict[str, list[float]]:
    """Run a step; return which part of each large copy ran beside kernels, by direction and in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model(x).square().mean().backward()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if "dur" in e]
    kernels = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel"]
    covered: dict[str, list[float]] = {"DtoH": [], "HtoD": []}
    for copy in sorted((e for e in events if e.get("cat") == "gpu_memcpy"), key=lambda e: e["ts"]):
        begin, end = copy["ts"], copy["ts"] + copy["dur"]
        for direction, parts in covered.items():
            if direction in copy["name"] and copy["dur"] > 500:
                overlap = sum(max(0, min(end, stop) - max(begin, start)) for start, stop in kernels)
                parts.append(overlap / (end - begin))
    return covered


@pytest.mark.gpu
def test_activation_offload_copies_while_the_gpu_computes(tmp_path):
    """Each block computes longer than the bus copies its input of 128 MiB.

    In each direction the first copy begins before any computation. Kernels of other processes take turns with
    these while copies go on, so one of several steps has to do; copies that wait never do.
    """
    model = nn.Sequential(*offloaded([checkpoint_wrapper(Block(8).cuda()) for _ in range(8)]))
    x = torch.randn(2**17, 256, device="cuda", requires_grad=True)
    for _ in range(2):  # the second time, pinned memory and streams exist
        model(x).square().mean().backward()
    torch.cuda.synchronize()
    best = {"DtoH": 0.0, "HtoD": 0.0}
    for step in range(8):
        for direction, parts in covered_by_kernels(model, x, tmp_path / f"{step}.json").items():
            assert len(parts) == 8
            best[direction] = max(best[direction], min(parts[1:]))
        if min(best.values()) > 0.8:
            break
    assert min(best.values()) > 0.8, best


@pytest.mark.gpu
@pytest.mark.parametrize("train_type", ["full", "bnb_dora", "hqq_lora"])
def test_cpu_offload_leaves_the_gpu_empty(train_type, checkpoints, alpaca_file, one_rank):
    args = arguments(checkpoints(), alpaca_file, train_type)
    on_gpu, offloaded = (
        one_rank(allocated_after_load, [*args, *more])[0] for more in ([], ["--use_cpu_offload"])
    )
    assert offloaded < 0.1 * on_gpu


def allocated_after_load(rank_info, args) -> int:
    before = torch.cuda.memory_allocated()
    model = set_up(rank_info, args)[1]
    held = torch.cuda.memory_allocated() - before
    del model
    return held


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["auto", "bf16", "fp16_autocast", "bf16_autocast", "bf16_buffers_autocast"])
@pytest.mark.parametrize("train_type", ["full", "bnb_dora", "hqq_lora"])
@pytest.mark.parametrize("more", [[], ["--use_cpu_offload"]], ids=["", "offload"])
def test_precision_follows_fp32(train_type, mode, more, checkpoints, alpaca_file, plain_run, one_rank):
    args = arguments(checkpoints("llama_bias"), alpaca_file, train_type, "--batch_size", "4")
    expected = plain_run(args)
    follows(expected, one_rank(train_run, [*args, "--precision", mode, *more])[0])


def run_on_a_t4(rank_info, args: list) -> tuple:
    """Run `train_run` on a GPU that looks like a T4."""
    with as_turing_gpu():
        return train_run(rank_info, args)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["--packing", "true"]], ids=["", "packed"])
@pytest.mark.parametrize("train_type", ["bnb_dora", "hqq_dora", "hqq_llama_pro"])
def test_a_t4_needs_no_triton(train_type, more, checkpoints, alpaca_file, plain_run, one_rank):
    """fp16 with --compile auto.

    bitsandbytes and plain operations dequantize, and packed rows have no variable-length attention.
    """
    base = checkpoints(biased_checkpoint(train_type))
    args = arguments(base, alpaca_file, train_type, "--batch_size", "4", *more)
    t4 = [*args, "--precision", "fp16_autocast", "--compile", "auto"]
    follows(plain_run(args), one_rank(run_on_a_t4, t4)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen2", "phi3", "gemma2", "gemma3"])
def test_compiled_families(kind, checkpoints, alpaca_file, one_rank):
    """With the code generator, which tests/parallel/test_activation_checkpointing.py skips; many lengths."""
    args = arguments(checkpoints(kind), alpaca_file, "bnb_dora", "--batch_size", "4", "--precision", "auto")
    plain = one_rank(train_run, [*args, "--compile", "false"])[0]
    compiled, graphs = one_rank(compiled_on_gpu, args)[0]
    assert graphs
    follows(plain, compiled)


@pytest.mark.gpu
def test_dropout_of_rows_of_many_lengths(checkpoints, alpaca_file, one_rank):
    """Compiled: the compiler generates the random numbers."""
    args = arguments(checkpoints(), alpaca_file, "bnb_dora", "--lora_dropout", "0.1", "--batch_size", "1")
    # Not in fp32: at least up to torch 2.11, Triton cannot compile dropout of such narrow rows in it.
    losses = one_rank(train_run, [*args, "--compile", "true", "--precision", "auto"])[0][0]
    assert losses[-1] < losses[0]


@pytest.mark.gpu
def test_a_resumed_compiled_run_is_bitwise_equal(source, one_rank, tmp_path):
    argv = [*source, *NOISY, "--compile", "true", "--precision", "auto", "--max_steps", "5", "--output_dir"]
    whole, folder = str(tmp_path / "whole"), str(tmp_path / "run")
    one_rank(run, [*argv, whole])
    assert "stopped at step 3 of 5" in one_rank(run, [*argv, folder], Signals({3: signal.SIGTERM}))[0]
    one_rank(run, [*argv, folder, "--resume", "auto"])
    assert (
        repeatable_metrics(Path(folder)) == repeatable_metrics(Path(whole)) and len(lines(Path(folder))) == 5
    )
    ours, theirs = adapter(Path(folder)), adapter(Path(whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
