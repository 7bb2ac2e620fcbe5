"""Runs with compiled layers, and the number of graphs compiled for them."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import torch
from torch._dynamo.utils import counters

import train
from models.loss import KERNELS
from parallel.activation_checkpointing import compile_run_layer
from tests.helpers.parity import arguments
from tests.helpers.runs import train_run

CHECKPOINTED = ["--batch_size", "4", "--use_gradient_checkpointing", "true"]
LAYERS, LINEARS = 3, 7  # of the tiny Llama, and in each layer
EXTRA_GRAPHS = 4  # graphs of the norm after the layers and of the loss's three kernels


def loss_compiled_with(backend: str):
    """Return a patch that compiles the loss with `backend`; tests/models/test_loss.py uses Inductor."""
    kernels = tuple(torch.compile(kernel, backend=backend) for kernel in KERNELS[False])
    return mock.patch.dict(KERNELS, {True: kernels})


def compiled_run(rank_info, argv: list[str]):
    """Return (`train_run`'s results, number of graphs compiled), with the backend aot_eager."""
    torch.compiler.reset()  # as in a fresh process
    before = counters["stats"]["unique_graphs"]
    with (
        mock.patch.object(train, "compile_run_layer", lambda cpus: compile_run_layer("aot_eager")),
        loss_compiled_with("aot_eager"),
    ):
        results = train_run(rank_info, [*argv, "--compile", "true"])
    return results, counters["stats"]["unique_graphs"] - before


def two_step_args(model: Path, folder: Path) -> list[str]:
    """Return the arguments of a run of two steps on rows of one length, so that layers are compiled once.

    The rows are longer than the tiny models' windows and short RoPE tables.
    """
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": letter * 40}) + "\n" for letter in "abcd"))
    return arguments(model, data, "bnb_dora", "--num_epochs", "2", "--max_steps", "2")


def compiled_on_gpu(rank_info, args) -> tuple:
    """Like `compiled_run`, with Inductor."""
    torch.compiler.reset()
    before = counters["stats"]["unique_graphs"]
    results = train_run(rank_info, [*args, "--compile", "true"])
    return results, counters["stats"]["unique_graphs"] - before
