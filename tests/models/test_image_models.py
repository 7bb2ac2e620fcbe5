"""Gemma 3 with images: its loss and gradients are those of PEFT, which sees each row by itself."""

from __future__ import annotations

import pytest

from models.family import unwrapped_name
from options.methods import METHODS
from parallel.shards import full_tensor
from tests.helpers.adapters import args_for, build_peft_model, peft_name
from tests.helpers.image_models import (
    FIRSTS,
    IMAGES,
    PACKED,
    ROWS,
    TOWER,
    loss_of_transformers,
    packed,
    padded,
    train_on_images,
)
from tests.helpers.parity import arguments, assert_same
from tests.helpers.picture_rows import write_pictures
from tests.helpers.runs import dense_tensors, set_up, trained_tensors
from tests.helpers.spellings import is_of_a_tower

TYPES = ["lora", "dora", "qlora", "bnb_dora", "hqq_dora"]
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


CASES = [
    *[(train_type, []) for train_type in TYPES],
    *[(train_type, TOWER) for train_type in TYPES],
    *[(train_type, [*TOWER, *PACKED]) for train_type in ("qlora", "bnb_dora", "hqq_dora")],
    ("bnb_dora", PACKED),
]
QUICK = [("bnb_dora", []), ("bnb_dora", [*TOWER, *PACKED])]


@pytest.mark.parametrize(
    ("train_type", "vision"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_loss_and_gradients_are_pefts(train_type, vision, checkpoints, alpaca_file, one_rank):
    """In fp32, with random adapters, on the dequantized weights: rows with two, one and no image."""
    folder = checkpoints("gemma3_wrapper")
    args = args_for(folder, alpaca_file, train_type, *IMAGES, *vision)
    ways, base, adapters = one_rank(learn, args)[0]
    in_tower = {name.rpartition(".")[0] for name in adapters if is_of_a_tower(name)}
    assert len(in_tower) == (2 * 6 if TOWER[0] in vision else 0)
    model = build_peft_model(folder, base, adapters, METHODS[train_type].adapter == "dora").eval()
    loss, gradients = learn_with_peft(model, adapters)
    for ours, our_gradients in ways.values():
        assert ours == pytest.approx(loss, rel=1e-5)
        assert_equal_gradients(our_gradients, gradients)


def learn_on_ranks(rank_info, args, batches) -> tuple[float, dict]:
    """Return (this rank's loss sum, gradients of all ranks' losses). batches: of each rank."""
    _, model = set_up(rank_info, args)
    return loss_and_gradients(model, batches[rank_info.rank])


@pytest.mark.parametrize(
    ("train_type", "options", "sharding"),
    [
        ("bnb_dora", [], ""),
        pytest.param("lora", [], "--sharding_strategy ddp", marks=pytest.mark.slow),
        pytest.param("qlora", [], "--use_cpu_offload true", marks=pytest.mark.slow),
        pytest.param("full", [], "", marks=pytest.mark.slow),
        pytest.param("bnb_llama_pro", PACKED, "", marks=pytest.mark.slow),
        pytest.param("qlora", ["--train_embeddings", "true"], "", marks=pytest.mark.slow),
        ("bnb_dora", [*TOWER, *PACKED], ""),
        pytest.param("dora", TOWER, "--sharding_strategy shard_grad_op", marks=pytest.mark.slow),
        pytest.param("lora", TOWER, "--wrap_policy sublayer", marks=pytest.mark.slow),
        pytest.param("qlora", TOWER, "--use_cpu_offload true", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one(train_type, options, sharding, checkpoints, alpaca_file, one_rank, two_ranks):
    """Three micro-batches: in the first one rank has no image, and in the last neither has.

    Two ranks recompute activations, and one saves them.
    """
    kind = "gemma3_wrapper_pro" if METHODS[train_type].expansion else "gemma3_wrapper"
    args = args_for(checkpoints(kind), alpaca_file, train_type, *IMAGES, *options)
    ranks = [
        [padded([0, 1]), padded([3]), padded([2])],
        [padded([2, 2], blank=True), padded([4]), padded([2])],
    ]
    found = two_ranks(learn_on_ranks, [*args, *sharding.split()], ranks)
    batches = [padded([row]) for row in (0, 1, 2, 2, 3, 4, 2, 2)]
    saving = ["--use_gradient_checkpointing", "false"]
    loss, gradients = one_rank(learn_on_ranks, [*args, *saving], [batches])[0]
    assert sum(loss for loss, _ in found) == pytest.approx(loss, rel=1e-5)
    for _, ours in found:
        assert_equal_gradients(ours, gradients)
    assert any(map(is_of_a_tower, gradients)) == (TOWER[0] in options)


@pytest.mark.parametrize("packing", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_training_on_two_ranks_is_that_on_one(
    packing, checkpoints, alpaca_file, one_rank, two_ranks, tmp_path
):
    """From image files on: the sampler deals rows with and without images, also to one rank alone."""
    refs = write_pictures(tmp_path, FIRSTS[-1])
    args = arguments(checkpoints("gemma3_wrapper"), alpaca_file, "bnb_dora", *TOWER, "--packing", packing)
    args += ["--num_epochs", "9", "--gradient_accumulation_steps", "2"]
    alone = one_rank(train_on_images, [*args, "--batch_size", "2"], refs)[0]
    found = two_ranks(train_on_images, [*args, "--batch_size", "1"], refs)
    assert_same(alone, found[0])
