"""Runs that must be the same: their options, and how near they must be."""

from __future__ import annotations

import torch

from options.methods import METHODS

# custom_* are the same methods: tests/options/test_config.py
TYPES = [t for t in METHODS if not t.startswith("custom_")]
STEPS = 5
PLAIN = ["--batch_size", "4", "--use_gradient_checkpointing", "false"]


def arguments(model, data, train_type: str, *more) -> list[str]:
    adapters = ["--lora_rank", "8", "--lora_alpha", "12"] if METHODS[train_type].adapter else []
    common = f"--lr 1e-3 --max_steps {STEPS} --context_length 256 --seed 3 --precision fp32".split()
    return ["--model_name", model, "--dataset", data, "--train_type", train_type, *common, *adapters, *more]


def biased(train_type: str) -> str:
    """The checkpoint for a train type: one with biases, expanded where new layers are trained."""
    return "llama_bias_pro" if METHODS[train_type].expansion else "llama_bias"


# All in fp32, on the CPU or on as many GPUs as there are ranks. Losses must agree to 1e-5 relative, gradient norms to 1e-4
# (AdamW would not notice a gradient that is wrong by a factor). Trained tensors after five AdamW steps of 1e-3 must agree
# to 2e-5 where they moved by up to 5e-3: AdamW's first steps are lr * g / |g|, so where a gradient is rounding noise the
# update is noise too; that is bounded here to a fiftieth of one step, and to a tenth on GPUs, where what is compiled in
# other pieces rounds otherwise.
TENSORS = 1e-4 if torch.cuda.is_available() else 2e-5


def assert_same(a, b, losses: float = 1e-5, tensors: float = TENSORS) -> None:
    torch.testing.assert_close(torch.tensor(a[0]), torch.tensor(b[0]), rtol=losses, atol=0)
    torch.testing.assert_close(torch.tensor(a[2]), torch.tensor(b[2]), rtol=1e-4, atol=0)
    assert a[0][0] > a[0][-1], "nothing was learned: the comparison would be empty"
    assert a[1].keys() == b[1].keys()
    for name, tensor in a[1].items():
        torch.testing.assert_close(
            tensor, b[1][name], rtol=0, atol=tensors, msg=lambda m, name=name: f"{name}: {m}"
        )
