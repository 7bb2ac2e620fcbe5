"""Gemma 3 with images: its loss and gradients are those of PEFT, which sees each row by itself."""

from __future__ import annotations

import pytest

from models.family import unwrapped_name
from options.methods import METHODS
from parallel.shards import full_tensor
from tests.helpers.adapters import args_for, build_peft_model, peft_name
from tests.helpers.image_rows import TEXTS, loss_of_transformers, packed, padded
from tests.helpers.runs import dense_tensors, set_up, trained_tensors

IMAGES = ["--images", "true"]
TYPES = ["lora", "dora", "qlora", "bnb_dora", "hqq_dora"]
ROWS = list(range(len(TEXTS)))
WAYS = {"padded": padded(ROWS), "packed": packed([[0, 1], [2, 3, 4]])}


def loss_and_gradients(model, batches) -> tuple[float, dict]:
    """Return (loss sum, {trained tensor: gradient}) of batches, accumulated. Collective."""
    model.zero_grad()
    total = 0.0
    for rows in batches:
        loss = model(**rows.inputs())
        loss.backward()
        total += loss.item()
    trained = {unwrapped_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return total, {name: full_tensor(p.grad).clone() for name, p in trained.items()}


def learn(rank_info, args) -> tuple[dict, dict, dict]:
    """Return ({way: (loss, gradients)} of all rows, the dequantized base, the adapters)."""
    job, model = set_up(rank_info, args)
    model.eval().set_attn_implementation(job.family.attention)
    ways = {way: loss_and_gradients(model, [rows]) for way, rows in WAYS.items()}
    ways["alone"] = loss_and_gradients(model, [padded([row]) for row in ROWS])
    return ways, dense_tensors(model), trained_tensors(model)


def learn_with_peft(model, names) -> tuple[float, dict]:
    """Return (loss sum, gradients) of PEFT's model, row by row, by our names of the adapters' tensors."""
    total = 0.0
    for row in ROWS:
        loss = loss_of_transformers(model, row)
        loss.backward()
        total += loss.item()
    parameters = dict(model.named_parameters())
    return total, {name: parameters[peft_name(name)].grad for name in names}


def assert_equal_gradients(ours: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    """Compare gradients by the norm of the difference, relative to the norm of theirs."""
    assert ours.keys() == theirs.keys() and all(gradient.any() for gradient in theirs.values())
    errors = {n: ((ours[n] - g).norm() / g.norm()).item() for n, g in theirs.items()}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize(
    "train_type", [pytest.param(t, marks=() if t == "bnb_dora" else pytest.mark.slow) for t in TYPES]
)
def test_loss_and_gradients_are_pefts(train_type, checkpoints, alpaca_file, one_rank):
    """In fp32, with random adapters, on the dequantized weights: rows with two, one and no image."""
    folder = checkpoints("gemma3_wrapper")
    ways, base, adapters = one_rank(learn, args_for(folder, alpaca_file, train_type, *IMAGES))[0]
    assert not any("vision" in name for name in adapters)
    model = build_peft_model(folder, base, adapters, METHODS[train_type].adapter == "dora").eval()
    loss, gradients = learn_with_peft(model, adapters)
    for ours, our_gradients in ways.values():
        assert ours == pytest.approx(loss, rel=1e-5)
        assert_equal_gradients(our_gradients, gradients)
