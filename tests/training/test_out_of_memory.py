"""The error line when a GPU is out of memory. tests/gpu/test_layers.py has a real GPU."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import train
from options.errors import UserError
from tests.helpers.parity import arguments
from tests.helpers.runs import make_job
from training import out_of_memory
from training.memory_changes import as_arguments
from training.out_of_memory import estimate_savings, list_changes


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
        (torch.distributed.DistBackendError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 "
                                            "'out of memory'"), True),
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
    expected = [as_arguments(change) for change, _ in estimate_savings(job)[:3]]
    assert len(advised) == 3 and advised == expected
