"""Each family's loss and gradients are those of transformers and PEFT, which see each row by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from data.batches import Batch, make_batch
from data.rows import IGNORE
from options.methods import METHODS
from tests.helpers.adapters import args_for, build_peft_model, peft_name
from tests.helpers.packing import LENGTHS, loss_and_gradients, packed_batch, padded_batch, seven_rows
from tests.helpers.products import slow
from tests.helpers.runs import dense_tensors, set_up, trained_tensors
from tests.helpers.tiny import CONFIGS, QUICK, VARIANTS

TYPES = ["lora", "dora", "qlora", "bnb_dora", "hqq_dora"]
# One of each family whose other tests are slow. DoRA's gradients have LoRA's in them. exaone4 has all layers
# of exaone4_small.
REPEATED = (*QUICK, "exaone4_small")
CASES = [
    pytest.param(kind, t, marks=() if t == "bnb_dora" and kind not in REPEATED else pytest.mark.slow)
    for kind in CONFIGS
    for t in TYPES
] + slow((kind, t) for kind in VARIANTS for t in ("lora", "bnb_dora"))


def learn(rank_info, args) -> tuple[dict, dict, dict]:
    """Return ({way: (loss, gradients)} of the seven rows, the dequantized base, the adapters)."""
    job, model = set_up(rank_info, args)
    model.set_attn_implementation(job.family.attention)  # which any batch may use
    packed = packed_batch()
    ways = {"padded": padded_batch(), "packed": packed, "leaking": Batch(packed.ids, packed.targets)}
    found = {way: loss_and_gradients(model, batch) for way, batch in ways.items()}
    return found, dense_tensors(model), trained_tensors(model)


def learn_with_peft(model, names) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the same of PEFT's model, given our names of the adapters' tensors."""
    rows, total = seven_rows(), 0.0
    for i, length in enumerate(LENGTHS):
        batch = make_batch(rows, torch.tensor([i]), (1, length))
        logits = model(input_ids=batch.ids).logits
        loss = F.cross_entropy(logits[0], batch.targets[0], ignore_index=IGNORE, reduction="sum")
        loss.backward()
        total += loss.item()
    parameters = dict(model.named_parameters())
    return total, {name: parameters[peft_name(name)].grad for name in names}


def relative_errors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return {name: norm of the difference, relative to the norm of theirs}."""
    assert ours.keys() == theirs.keys() and all(gradient.any() for gradient in theirs.values())
    return {n: ((ours[n] - gradient).norm() / gradient.norm()).item() for n, gradient in theirs.items()}


@pytest.mark.parametrize(("kind", "train_type"), CASES)
def test_loss_and_gradients_are_pefts(kind, train_type, checkpoints, alpaca_file, one_rank):
    """In fp32, with random adapters, on the same (dequantized) weights, for padded and for packed rows."""
    folder = checkpoints(kind)
    found, base, adapters = one_rank(learn, args_for(folder, alpaca_file, train_type))[0]
    model = build_peft_model(folder, base, adapters, METHODS[train_type].adapter == "dora")
    loss, gradients = learn_with_peft(model, adapters)
    leaks = relative_errors(found.pop("leaking")[1], gradients)
    assert min(leaks.values()) > 0.01, "rows that see one another would not show"
    for ours, our_gradients in found.values():
        assert ours == pytest.approx(loss, rel=1e-5)
        errors = relative_errors(our_gradients, gradients)
        assert max(errors.values()) < 1e-5, errors
