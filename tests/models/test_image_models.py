"""Gemma 3 with images: its loss and gradients are those of PEFT, which sees each row by itself."""

from __future__ import annotations

import pytest
import torch

from finished.finished_run import load_model, open_run
from models.family import unwrapped_name
from models.registry import read_config
from options.errors import UserError
from options.methods import METHODS
from parallel.shards import full_tensor
from tests.helpers.adapters import args_for, build_peft_model, peft_name
from tests.helpers.auto_classes import load_transformers_model
from tests.helpers.expansion import all_tensors
from tests.helpers.finished_runs import write_random_run
from tests.helpers.image_models import TEXTS, loss_of_transformers, packed, padded
from tests.helpers.runs import dense_state, dense_tensors, set_up, trained_tensors
from tests.helpers.spellings import SPELLINGS, is_of_a_tower, respell

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


def learn_on_ranks(rank_info, args, batches) -> tuple[float, dict]:
    """Return (this rank's loss sum, gradients of all ranks' losses). batches: of each rank."""
    _, model = set_up(rank_info, args)
    return loss_and_gradients(model, batches[rank_info.rank])


@pytest.mark.parametrize(
    ("train_type", "more"),
    [
        ("bnb_dora", ["--use_gradient_checkpointing", "true"]),
        pytest.param("lora", ["--sharding_strategy", "ddp"], marks=pytest.mark.slow),
        pytest.param("qlora", ["--use_cpu_offload", "true"], marks=pytest.mark.slow),
        pytest.param("full", [], marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one(train_type, more, checkpoints, alpaca_file, one_rank, two_ranks):
    """Three micro-batches: in the first one rank has no image, and in the last neither has."""
    args = args_for(checkpoints("gemma3_wrapper"), alpaca_file, train_type, *IMAGES)
    ranks = [
        [padded([0, 1]), padded([3]), padded([2])],
        [padded([2, 2], blank=True), padded([4]), padded([2])],
    ]
    found = two_ranks(learn_on_ranks, [*args, *more], ranks)
    batches = [padded([row]) for row in (0, 1, 2, 2, 3, 4, 2, 2)]
    options = ["--use_gradient_checkpointing", "false"]
    loss, gradients = one_rank(learn_on_ranks, [*args, *options], [batches])[0]
    assert sum(loss for loss, _ in found) == pytest.approx(loss, rel=1e-5)
    for _, ours in found:
        assert_equal_gradients(ours, gradients)
    assert not any("vision_tower" in name or "projector" in name for name in gradients)


@pytest.mark.parametrize(
    "spelling", [pytest.param(s, marks=() if s == "hub" else pytest.mark.slow) for s in SPELLINGS]
)
def test_the_vision_parts_load_from_every_spelling(spelling, checkpoints, alpaca_file, one_rank, tmp_path):
    base = respell(checkpoints("gemma3_wrapper"), tmp_path / "base", SPELLINGS[spelling])
    ours = one_rank(dense_state, args_for(base, alpaca_file, "lora", *IMAGES))[0]
    theirs = load_transformers_model(base, dtype=torch.float32).state_dict()
    names = {name for name in theirs if is_of_a_tower(name)}
    assert names == {name for name in ours if is_of_a_tower(name)} and len(names) > 30
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16_autocast"])
def test_the_tower_in_16_bits(precision, checkpoints, alpaca_file, one_rank):
    """The memory of the weights is checked by `set_up`."""
    args = args_for(checkpoints("gemma3_wrapper"), alpaca_file, "lora", *IMAGES)
    loss, _ = one_rank(loss_in, args, "fp32")[0]
    found, dtypes = one_rank(loss_in, args, precision)[0]
    assert found == pytest.approx(loss, rel=0.03)
    linears = {dtype for name, dtype in dtypes.items() if ".encoder." in name and "norm" not in name}
    others = {*dtypes.values()} - linears
    assert linears == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert others == (set() if precision == "bf16" else {torch.float32}), "the stream of hidden states"


def loss_in(rank_info, args, precision) -> tuple[float, dict]:
    """Return (loss sum of all rows, {parameter of the vision parts: its dtype})."""
    job, model = set_up(rank_info, [*args, "--precision", precision])
    with torch.no_grad(), job.precision.context(rank_info.device.type):
        loss = model(**WAYS["padded"].inputs()).item()
    return loss, {name: p.dtype for name, p in model.named_parameters() if is_of_a_tower(name)}


@pytest.mark.parametrize("train_type", ["full", pytest.param("bnb_dora", marks=pytest.mark.slow)])
def test_a_run_is_opened_with_its_vision_parts(train_type, checkpoints, alpaca_file, one_rank, tmp_path):
    """A whole model has its base's tower, bit for bit, in the base's spelling."""
    base = respell(checkpoints("gemma3_wrapper"), tmp_path / "base", SPELLINGS["hub"])
    args = args_for(base, alpaca_file, train_type, *IMAGES, "--precision", "bf16")
    write_random_run(one_rank, tmp_path / "run", args)
    run = open_run(tmp_path / "run")
    model = load_model(run, torch.device("cpu"), torch.float32)
    if train_type == "full":
        before, after = all_tensors(base), all_tensors(tmp_path / "run")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before if is_of_a_tower(name))
        theirs = load_transformers_model(tmp_path / "run", dtype=torch.float32).eval()
        with torch.no_grad():
            loss = sum(loss_of_transformers(theirs, row) for row in ROWS)
            torch.testing.assert_close(model(**WAYS["padded"].inputs()), loss, rtol=1e-5, atol=0)
    assert run.is_base_verified and run.family.has_images


def test_images_for_a_model_of_text_alone(checkpoints):
    with pytest.raises(UserError, match=r"llama is trained on text alone.*with images: gemma3$"):
        read_config(checkpoints("llama"), images=True)
