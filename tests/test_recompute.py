"""Compiled layers, and what layers keep for backward, change nothing but speed and memory; tolerances as in
test_parity.py, which says why.

The compiler's own code generator needs a C++ compiler or a GPU; here all comes before it: tracing whole layers
without a break, the graphs of forward and backward, and what is run again. tests/test_gpu_modes.py has the rest.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

import train
from recompute import compiler
from tests.runs import train_run
from tests.test_parity import TYPES, arguments, assert_same, biased

PLAIN = ["--batch_size", "4", "--use_gradient_checkpointing", "false"]


def compiled_run(place, argv: list[str]):
    """(`train_run`'s results, graphs that were made)."""
    torch.compiler.reset()  # as in a fresh process
    before = counters["stats"]["unique_graphs"]
    with mock.patch.object(train, "compiler", lambda: compiler("aot_eager")):
        results = train_run(place, [*argv, "--compile", "true"])
    return results, counters["stats"]["unique_graphs"] - before


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("train_type", TYPES)
def test_compiled(train_type, checkpointing, checkpoints, alpaca_file, plain_run, one_rank):
    args = arguments(checkpoints(biased(train_type)), alpaca_file, train_type)
    options = ["--batch_size", "4", "--use_gradient_checkpointing", checkpointing]
    results, graphs = one_rank(compiled_run, [*args, *options])[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    # Once for each kind of layer, with and without a gradient for its input, and again for other lengths of rows.
    kinds = {"full": 1}.get(train_type, 2)
    assert kinds <= graphs <= 3 * kinds
