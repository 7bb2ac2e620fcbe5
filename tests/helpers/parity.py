"""Runs that must give the same results: their arguments, and the tolerances."""

from __future__ import annotations

import torch

from options.methods import METHODS

# custom_* are the same methods: tests/options/test_config.py
TYPES = [t for t in METHODS if not t.startswith("custom_")]
STEPS = 5
PLAIN = ["--batch_size", "4", "--use_gradient_checkpointing", "false"]


def arguments(model, data, train_type: str, *more) -> list[str]:
    """Return the arguments of a run of STEPS steps in fp32."""
    adapters = ["--lora_rank", "8", "--lora_alpha", "12"] if METHODS[train_type].adapter else []
    common = f"--lr 1e-3 --max_steps {STEPS} --context_length 256 --seed 3 --precision fp32".split()
    return ["--model_name", model, "--dataset", data, "--train_type", train_type, *common, *adapters, *more]


def biased_checkpoint(train_type: str) -> str:
    """Return the kind of checkpoint for a train type: with biases, and expanded if it trains new layers."""
    return "llama_bias_pro" if METHODS[train_type].expansion else "llama_bias"


# All in fp32, on the CPU or on one GPU per rank. Losses must agree to 1e-5 relative, gradient norms to 1e-4
# (AdamW would not notice a gradient that is wrong by a factor). Trained tensors move by up to 5e-3 in five
# AdamW steps of 1e-3, and must agree to 2e-5. AdamW's first steps are lr * g / |g|: where a gradient is
# rounding noise, the update is noise too. The tolerance bounds that noise to a fiftieth of one step, and on
# GPUs, where differently compiled graphs round differently, to a tenth.
TENSORS = 1e-4 if torch.cuda.is_available() else 2e-5


def assert_same(a, b, losses: float = 1e-5, tensors: float = TENSORS) -> None:
    """Compare two results of `train_run`. losses: relative tolerance; tensors: absolute tolerance."""
    torch.testing.assert_close(torch.tensor(a[0]), torch.tensor(b[0]), rtol=losses, atol=0)
    torch.testing.assert_close(torch.tensor(a[2]), torch.tensor(b[2]), rtol=1e-4, atol=0)
    assert a[0][0] > a[0][-1], "nothing was learned: the comparison would be empty"
    assert a[1].keys() == b[1].keys()
    for name, tensor in a[1].items():
        torch.testing.assert_close(
            tensor, b[1][name], rtol=0, atol=tensors, msg=lambda m, name=name: f"{name}: {m}"
        )


def follows(expected: tuple, got: tuple) -> None:
    """Compare losses and gradient norms of `train_run`, up to 16-bit rounding."""
    (losses, _, norms), tensor = got, torch.tensor
    torch.testing.assert_close(tensor(losses), tensor(expected[0]), rtol=2e-2, atol=0)
    torch.testing.assert_close(tensor(norms), tensor(expected[2]), rtol=1e-1, atol=0)
