"""Models with images: loss and gradients are those of PEFT, which sees each row by itself."""

from __future__ import annotations

import pytest
import torch

from models.family import unwrapped_name
from options.methods import METHODS
from parallel.shards import full_tensor
from tests.helpers.adapters import args_for, build_peft_model, peft_name
from tests.helpers.image_models import (
    FIRSTS,
    GEMMA,
    IMAGES,
    MODELS,
    PACKED,
    PROJECTOR,
    ROWS,
    TOWER,
    TinyModel,
    loss_of_transformers,
    packed,
    padded,
    train_on_images,
)
from tests.helpers.parity import arguments, assert_same
from tests.helpers.picture_rows import write_pictures
from tests.helpers.products import products, slow
from tests.helpers.runs import dense_tensors, set_up, trained_tensors
from tests.helpers.spellings import is_of_a_tower

TYPES = ["lora", "dora", "qlora", "bnb_dora", "hqq_dora"]


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


def learn(rank_info, args, of: TinyModel) -> tuple[dict, dict, dict]:
    """Return ({way: (loss, gradients)} of all rows, the dequantized base, the adapters)."""
    job, model = set_up(rank_info, args)
    model.eval().set_attn_implementation(job.family.attention)
    batches = {
        "padded": [padded(ROWS, of=of)],
        "packed": [packed([[0, 1], [2, 3, 4]], of)],
        "alone": [padded([row], of=of) for row in ROWS],
    }
    ways = {way: loss_and_gradients(model, rows) for way, rows in batches.items()}
    return ways, dense_tensors(model), trained_tensors(model)


def learn_with_peft(model, names, of: TinyModel) -> tuple[float, dict]:
    """Return (loss sum, gradients) of PEFT's model, row by row, by our names of the adapters' tensors."""
    total = 0.0
    for row in ROWS:
        loss = loss_of_transformers(model, row, of)
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
    *[(name, train_type, options) for name in MODELS for train_type in TYPES for options in ([], TOWER)],
    *[
        (name, train_type, [*TOWER, *PACKED])
        for name in MODELS
        for train_type in ("qlora", "bnb_dora", "hqq_dora")
    ],
    *[(name, "bnb_dora", PACKED) for name in MODELS],
    ("qwen3_vl", "bnb_dora", PROJECTOR),
    ("gemma3", "lora", PROJECTOR),
    ("gemma3", "qlora", PROJECTOR),
]
QUICK = [
    ("gemma3", "bnb_dora", []),
    ("gemma3", "qlora", PROJECTOR),
    *[(name, "bnb_dora", [*TOWER, *PACKED]) for name in MODELS],
]


@pytest.mark.parametrize(
    ("name", "train_type", "vision"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_loss_and_gradients_are_pefts(name, train_type, vision, checkpoints, alpaca_file, one_rank):
    """In fp32, with random adapters, on the dequantized weights: rows with two, one and no image."""
    of = MODELS[name]
    folder = checkpoints(of.kind)
    args = args_for(folder, alpaca_file, train_type, *IMAGES, *vision)
    ways, base, adapters = one_rank(learn, args, of)[0]
    in_tower = {name.rpartition(".")[0] for name in adapters if is_of_a_tower(name)}
    assert len(in_tower) == of.n_adapted(vision, train_type)
    model = build_peft_model(folder, base, adapters, METHODS[train_type].adapter == "dora").eval()
    loss, gradients = learn_with_peft(model, adapters, of)
    for ours, our_gradients in ways.values():
        assert ours == pytest.approx(loss, rel=1e-5)
        assert_equal_gradients(our_gradients, gradients)


def logits_both_ways(rank_info, args, of: TinyModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of a row with two images, of our forward and of transformers'."""
    job, model = set_up(rank_info, args)
    model.eval().set_attn_implementation(job.family.attention)
    rows = padded([1], of=of)
    ids = rows.batch.ids
    with torch.no_grad():
        ours = model(input_ids=ids, images=rows.images).logits
        theirs = model(input_ids=ids, use_cache=False, **model.generation_inputs(rows.images)).logits
    return ours, theirs


@pytest.mark.parametrize("name", ["qwen3_vl", *slow(["gemma3", "qwen2_5_vl"])])
def test_transformers_forward_takes_the_images(name, checkpoints, alpaca_file, one_rank):
    """As generation does it: its own masks, positions and places of features."""
    args = args_for(checkpoints(MODELS[name].kind), alpaca_file, "lora", *IMAGES)
    ours, theirs = one_rank(logits_both_ways, args, MODELS[name])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def losses_of_texts(rank_info, args, of: TinyModel) -> tuple[float, float]:
    """Return the losses of a row without images, twice in a pack, and twice alone."""
    job, model = set_up(rank_info, args)
    model.eval().set_attn_implementation(job.family.attention)
    with torch.no_grad():
        in_pack, alone = (model(**rows.inputs()) for rows in (packed([[2, 2]], of), padded([2, 2], of=of)))
    return in_pack.item(), alone.item()


@pytest.mark.parametrize(
    ("images", "name"),
    products([True, False], MODELS, always=[(False, "qwen2_5_vl"), (True, "qwen3_vl")], left_out=["gemma3"]),
)
def test_packed_texts_are_rows_alone(images, name, checkpoints, alpaca_file, one_rank):
    """Where masks separate rows, in micro-batches without images; with and without the vision parts."""
    args = args_for(checkpoints(MODELS[name].kind), alpaca_file, "lora", *(IMAGES if images else ()))
    in_pack, alone = one_rank(losses_of_texts, args, MODELS[name])[0]
    assert in_pack == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("name", ["gemma3", *slow(["qwen3_vl", "qwen2_5_vl"])])
def test_the_tower_takes_a_micro_batch_at_once(name, checkpoints, alpaca_file, one_rank):
    """The images of all padded rows, in one call; so the planner counts its memory."""
    args = args_for(checkpoints(MODELS[name].kind), alpaca_file, "lora", *IMAGES)
    assert one_rank(patches_of_calls, args, MODELS[name])[0] == [
        sum(width * height for width, height in MODELS[name].sizes) // 4**2
    ]


def patches_of_calls(rank_info, args, of: TinyModel) -> list[int]:
    """Return the patches of each call of the tower in the forward of a batch with all rows."""
    job, model = set_up(rank_info, args)
    found = []
    block = job.family.vision.tower_blocks(model)[0]
    block.register_forward_hook(lambda module, given, result: found.append(result.numel() // 16))
    with torch.no_grad():
        model(**padded(ROWS, of=of).inputs())
    return found


def learn_on_ranks(rank_info, args, batches) -> tuple[float, dict]:
    """Return (this rank's loss sum, gradients of all ranks' losses). batches: of each rank."""
    _, model = set_up(rank_info, args)
    return loss_and_gradients(model, batches[rank_info.rank])


@pytest.mark.parametrize(
    ("name", "train_type", "options", "sharding"),
    [
        ("gemma3", "bnb_dora", [], ""),
        *slow((name, "bnb_dora", [*TOWER, *PACKED], "") for name in MODELS),
        *slow([("gemma3", "qlora", PROJECTOR, "")]),
        *slow(
            (name, *case)
            for name in MODELS
            for case in (
                ("lora", [], "--sharding_strategy ddp"),
                ("qlora", [], "--use_cpu_offload true"),
                ("full", [], ""),
                ("bnb_llama_pro", PACKED, ""),
                ("qlora", ["--train_embeddings", "true"], ""),
                ("dora", TOWER, "--sharding_strategy shard_grad_op"),
                ("lora", TOWER, "--wrap_policy sublayer"),
                ("qlora", TOWER, "--use_cpu_offload true"),
            )
        ),
    ],
)
def test_two_ranks_are_one(
    name, train_type, options, sharding, checkpoints, alpaca_file, one_rank, two_ranks
):
    """Three micro-batches: in the first one rank has no image, and in the last neither has.

    Two ranks recompute activations, and one saves them.
    """
    of = MODELS[name]
    kind = f"{of.kind}_pro" if METHODS[train_type].expansion else of.kind
    args = args_for(checkpoints(kind), alpaca_file, train_type, *IMAGES, *options)
    ranks = [
        [padded([0, 1], of=of), padded([3], of=of), padded([2], of=of)],
        [padded([2, 2], blank=True, of=of), padded([4], of=of), padded([2], of=of)],
    ]
    found = two_ranks(learn_on_ranks, [*args, *sharding.split()], ranks)
    batches = [padded([row], of=of) for row in (0, 1, 2, 2, 3, 4, 2, 2)]
    saving = ["--use_gradient_checkpointing", "false"]
    loss, gradients = one_rank(learn_on_ranks, [*args, *saving], [batches])[0]
    assert sum(loss for loss, _ in found) == pytest.approx(loss, rel=1e-5)
    for _, ours in found:
        assert_equal_gradients(ours, gradients)
    assert any(map(is_of_a_tower, gradients)) == ("--vision_targets" in options)


@pytest.mark.parametrize(
    ("name", "packing"),
    products(
        # Rows alone of gemma3: test_two_ranks_are_one.
        *(MODELS, ["false", "true"]),
        always=[("qwen3_vl", "true")],
        left_out=["gemma3", "qwen2_5_vl", "false"],
    ),
)
def test_training_on_two_ranks_is_that_on_one(
    name, packing, checkpoints, alpaca_file, one_rank, two_ranks, tmp_path
):
    """From image files on: the sampler deals rows with and without images, also to one rank alone."""
    of = MODELS[name]
    refs = write_pictures(tmp_path, FIRSTS[-1], None if of is GEMMA else of.sizes)
    args = arguments(checkpoints(of.kind), alpaca_file, "bnb_dora", *TOWER, "--packing", packing)
    args += ["--num_epochs", "9", "--gradient_accumulation_steps", "2"]
    alone = one_rank(train_on_images, [*args, "--batch_size", "2"], refs, of)[0]
    found = two_ranks(train_on_images, [*args, "--batch_size", "1"], refs, of)
    assert_same(alone, found[0])
