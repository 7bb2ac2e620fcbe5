"""The error line when a GPU is out of memory. tests/gpu/test_layers.py has a real GPU."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

import train
from launch.precision import detect_precision
from monitoring.memory_model import LAYER_ACTIVATIONS, RunSizes, estimate_memory
from monitoring.weight_memory import WeightBytes
from options.errors import UserError
from tests.helpers.parity import arguments
from tests.helpers.runs import make_job
from training import out_of_memory
from training.out_of_memory import estimate_job_peak, estimate_savings, list_changes, measure_job_sizes

H, V, LAYERS = 64, 300, 3  # tests/helpers/tiny.py's Llama


@pytest.fixture(scope="module")
def job_of(checkpoints, alpaca_file):
    """job_of(train type, more options) -> the checked Job of one rank."""
    jobs = {}

    def get(train_type: str, *more: str):
        if (train_type, more) not in jobs:
            args = arguments(checkpoints(), alpaca_file, train_type, *more)
            jobs[train_type, more] = make_job(SimpleNamespace(world=1), args)
        return jobs[train_type, more]

    return get


def test_the_shape_of_a_job(job_of):
    job = job_of("lora")
    shape = measure_job_sizes(job, job.config)
    longest = int(job.rows.lengths().max())
    assert dataclasses.astuple(shape)[:6] == (longest, H, V, LAYERS, 4, False)
    assert shape.weights.total == LAYERS * shape.layer + 4 * (2 * V * H + H)  # embedding, head, the last norm
    full = job_of("full")
    assert (shape.vocabulary_bytes, measure_job_sizes(full, full.config).vocabulary_bytes) == (
        0,
        4 * V * H,
    ), "gathered where it is trained"


def bytes_less(job, **change) -> float:
    """The bytes that a change saves, from two estimates."""
    config = dataclasses.replace(job.config, **change)
    return estimate_job_peak(job, job.config) - estimate_job_peak(job, config)


def test_memory_of_shards_and_states(job_of):
    """Each of two ranks has half of fp32 weights, gradients and two moments."""
    job = job_of("full")
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, world_size=2))
    weights = measure_job_sizes(job, job.config).weights.total
    assert bytes_less(job, use_cpu_offload=True) == pytest.approx(4 * weights / 2)
    assert bytes_less(job, optimizer="adamw_8bit") == pytest.approx((2 * weights - 2.03 * weights / 4) / 2)
    assert bytes_less(job, optimizer="sgd") == pytest.approx(2 * weights / 2)
    copied = dataclasses.replace(job, config=dataclasses.replace(job.config, sharding_strategy="ddp"))
    assert bytes_less(copied, sharding_strategy="full_shard") == pytest.approx(4 * weights / 2)


def test_an_embedding_in_host_memory_takes_no_gpu_memory(job_of):
    """A frozen embedding that is not the head's is on the host already: offload saves nothing of it."""
    job = job_of("qlora")
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, world_size=2))
    shape = measure_job_sizes(job, job.config)
    on_gpu = shape.weights.total - 4 * V * H + 3 * shape.weights.trained
    assert bytes_less(job, use_cpu_offload=True) == pytest.approx(on_gpu / 2)
    assert measure_job_sizes(job_of("full"), job_of("full").config).on_host == 0


def test_memory_of_a_batch():
    """With checkpointing: the layers' inputs, and all activations of one layer."""
    weights = WeightBytes(trained=1000)
    shape = RunSizes(
        tokens=100,
        hidden=64,
        vocabulary=10,
        layers=5,
        heads=1,
        eager=False,
        weights=weights,
        layer=1,
        vocabulary_bytes=0,
    )
    given = [
        "--batch_size",
        "4",
        "--world_size",
        "1",
        "--precision",
        "fp32",
        "--use_gradient_checkpointing",
        "true",
    ]
    config = train.parse([*given, "--sharding_strategy", "full_shard"])[0]
    smaller = dataclasses.replace(config, batch_size=1)
    expected = 3 * 100 * 64 * 4 * (5 + LAYER_ACTIVATIONS)
    assert (
        estimate_memory(config, detect_precision(config.precision), shape, None).peak
        - estimate_memory(smaller, detect_precision(smaller.precision), shape, None).peak
        == expected
    )


def test_the_loss_does_not_grow_with_the_ranks():
    """Ranks that share a frozen head gather their hidden states one block at a time."""
    sizes = dict.fromkeys(("layers", "heads", "layer", "vocabulary_bytes", "eager"), 0)
    weights = WeightBytes()
    shape = RunSizes(tokens=2**16, hidden=4096, vocabulary=2**17, weights=weights, **sizes)
    given = "--sharding_strategy full_shard --use_gradient_checkpointing true --world_size".split()
    few, many = (
        estimate_memory(train.parse([*given, n])[0], detect_precision("auto"), shape, None).peak
        for n in ("32", "64")
    )
    assert few == many


def test_only_options_that_are_not_in_use_are_advised(job_of):
    named = [set(change) for change in list_changes(job_of("qlora", "--use_gradient_checkpointing", "false"))]
    assert {"use_cpu_offload"} in named and {"use_activation_cpu_offload"} not in named, (
        "checkpointing is off"
    )
    assert {"train_type"} not in named and {"train_type"} in [set(c) for c in list_changes(job_of("lora"))]
    more = ("--use_cpu_offload", "--use_gradient_checkpointing", "true", "--use_activation_cpu_offload")
    named = [set(change) for change in list_changes(job_of("qlora", *more, "--optimizer", "adamw_8bit"))]
    assert [c for c in ("use_cpu_offload", "use_activation_cpu_offload", "optimizer") if {c} in named] == []


@pytest.mark.parametrize("train_type", ["full", "lora", "bnb_dora", "hqq_lora"])
def test_savings_are_sorted_and_possible(train_type, job_of):
    found = estimate_savings(job_of(train_type))
    gains = [gain for _, gain in found]
    assert len(found) >= 3 and gains == sorted(gains, reverse=True) and gains[-1] > 0
    for change, _ in found:  # each is valid on the command line
        train.parse([f"--{name}={value}" for name, value in change.items()] + ["--model_name", "some/model"])


@pytest.mark.parametrize(
    "error, known",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.91 GiB. GPU 0 has a total capacity"
                                " of 14.56 GiB of which 1.20 GiB is free. Process 7 has"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
    ],
)  # fmt: skip
def test_a_run_without_memory(error, known, job_of):
    def run(rank_info, job):
        raise error

    job = job_of("lora")
    with pytest.raises(UserError if known else RuntimeError) as raised:
        out_of_memory.explain_out_of_memory(run)(None, job)
    text = str(raised.value)
    if not known:
        assert text == str(error) and not isinstance(raised.value, UserError)
        return
    assert text.startswith("CUDA out of memory in the phase: start")
    numbers = "(Tried to allocate 3.91 GiB; total capacity of 14.56 GiB; 1.20 GiB is free)"
    assert (numbers in text) == isinstance(error, torch.OutOfMemoryError)
    advised = re.findall(r"(--\w+ \S+(?: --\w+ \S+)*) \(about [\d.]+ [GM]iB less\)", text)
    expected = [out_of_memory._as_arguments(change) for change, _ in estimate_savings(job)[:3]]
    assert len(advised) == 3 and advised == expected
