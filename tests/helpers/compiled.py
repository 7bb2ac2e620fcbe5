"""Runs with compiled layers, and how many graphs are made for them."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import torch
from torch._dynamo.utils import counters

import train
from models.loss import KERNELS
from parallel.activation_checkpointing import compiler
from tests.helpers.parity import arguments
from tests.helpers.runs import train_run

CHECKPOINTED = ["--batch_size", "4", "--use_gradient_checkpointing", "true"]
LAYERS, LINEARS = 3, 7  # of the tiny Llama, and in each layer
BESIDES = 4  # graphs of the norm after the layers and of the loss's three kernels


def loss_compiled_with(backend: str):
    """The loss is compiled like the layers; Inductor's own kernels of it are in tests/models/test_loss.py."""
    kernels = tuple(torch.compile(kernel, backend=backend) for kernel in KERNELS[False])
    return mock.patch.dict(KERNELS, {True: kernels})


def compiled_run(rank_info, argv: list[str]):
    """(`train_run`'s results, graphs that were made)."""
    torch.compiler.reset()  # as in a fresh process
    before = counters["stats"]["unique_graphs"]
    with mock.patch.object(train, "compiler", lambda: compiler("aot_eager")), loss_compiled_with("aot_eager"):
        results = train_run(rank_info, [*argv, "--compile", "true"])
    return results, counters["stats"]["unique_graphs"] - before


def two_steps(model: Path, folder: Path) -> list[str]:
    """Arguments of rows of one length, so that each kind of layer is compiled once, beyond the tiny models' windows and
    short tables."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": letter * 40}) + "\n" for letter in "abcd"))
    return arguments(model, data, "bnb_dora", "--num_epochs", "2", "--max_steps", "2")


def compiled_on_gpu(rank_info, args) -> tuple:
    """The same with the compiler's own code generator."""
    torch.compiler.reset()
    before = counters["stats"]["unique_graphs"]
    results = train_run(rank_info, [*args, "--compile", "true"])
    return results, counters["stats"]["unique_graphs"] - before
