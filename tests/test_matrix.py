"""Every train type with every way of sharding, offloading, recomputing and wrapping equals the plain run.

The plain run is one process without recomputation and offloading. tests/helpers/parity.py explains the
tolerances.

`make test` does not run every product of options: each variant meets some train types, and each train type
some variant. `make test-slow` runs the rest.
"""

from __future__ import annotations

import pytest
import torch

from options.config import FIELDS
from options.strategies import STRATEGIES
from parallel.activation_offload import HostActivations, HostTensor
from quantization.layer import Linear4bit
from tests.helpers import tiny
from tests.helpers.parity import TYPES, arguments, assert_same, biased_checkpoint
from tests.helpers.products import products, slow
from tests.helpers.runs import set_up, train_run
from wrapping import WRAP_POLICIES

CHECKPOINTED = "--use_gradient_checkpointing true"
VARIANTS = {
    "checkpointing, sublayer units, activation offload": f"{CHECKPOINTED} --wrap_policy sublayer"
    " --use_activation_cpu_offload",
    "shard_grad_op, offload": "--use_gradient_checkpointing false --sharding_strategy shard_grad_op"
    " --use_cpu_offload",
    "ddp, sublayer units": "--use_gradient_checkpointing false --sharding_strategy ddp"
    " --wrap_policy sublayer",
}
# Hybrid strategies differ from these only in the mesh: one train type of each kind tests them, in two and
# four ranks.
ON_TWO = {
    "shard_grad_op, all else": f"{CHECKPOINTED} --sharding_strategy shard_grad_op --wrap_policy sublayer"
    " --use_cpu_offload --use_activation_cpu_offload",
    "ddp, accumulation without reductions": f"{CHECKPOINTED} --sharding_strategy ddp --batch_size 1"
    " --gradient_accumulation_steps 2 --no_sync",
    "offload, accumulation": "--use_cpu_offload --batch_size 1 --gradient_accumulation_steps 2",
    "one node is one group": "--sharding_strategy hybrid_full_shard",
    "groups of one": "--sharding_strategy hybrid_shard_grad_op --hybrid_shard_size 1",
}
ON_FOUR = {
    "hybrid 2x2": "--sharding_strategy hybrid_full_shard --hybrid_shard_size 2",
    "hybrid 2x2, kept, sublayer units, offload": "--sharding_strategy hybrid_shard_grad_op"
    " --hybrid_shard_size 2 --wrap_policy sublayer --use_cpu_offload",
    "hybrid 2x2, accumulation without reductions": "--sharding_strategy hybrid_full_shard"
    " --hybrid_shard_size 2 --gradient_accumulation_steps 2 --no_sync --dataset_samples 40",
}
PLAIN = ["--batch_size", "4", "--use_gradient_checkpointing", "false"]


@pytest.fixture
def plain(checkpoints, short_rows, plain_run):
    """plain(train_type) -> (arguments, results of the plain run)."""

    def get(train_type: str):
        args = arguments(checkpoints(biased_checkpoint(train_type)), short_rows, train_type)
        return args, plain_run([*args, *PLAIN])

    return get


UNITS, KEPT, WHOLE = VARIANTS
# bnb_dora, qlora and hqq_llama_pro meet variants of the same options in test_two_ranks_more.
SOME = [
    *((train_type, UNITS) for train_type in ("full", "dora", "hqq_dora", "bnb_llama_pro")),
    ("lora", KEPT),
    *((train_type, WHOLE) for train_type in ("hqq_lora", "llama_pro")),
]


@pytest.mark.parametrize(
    ("train_type", "variant"),
    products(TYPES, VARIANTS, always=SOME, left_out=["bnb_dora", "qlora", "hqq_llama_pro"]),
)
def test_two_ranks(train_type, variant, plain, two_ranks):
    args, expected = plain(train_type)
    assert_same(expected, two_ranks(train_run, [*args, "--batch_size", "2", *VARIANTS[variant].split()])[0])


MORE = list(zip(["bnb_dora", "hqq_dora", "qlora", "full", "hqq_llama_pro"], ON_TWO, strict=True))


@pytest.mark.parametrize(
    ("train_type", "variant"),
    # The other types meet variants of the same options above.
    products(TYPES, ON_TWO, always=MORE, left_out=["lora", "dora", "hqq_lora", "llama_pro", "bnb_llama_pro"]),
)
def test_two_ranks_more(train_type, variant, plain, two_ranks):
    args, expected = plain(train_type)
    assert_same(expected, two_ranks(train_run, [*args, "--batch_size", "2", *ON_TWO[variant].split()])[0])


# Slow: biases, caps, fused linears and wrappers' names do not change how anything is moved or recomputed.
# tests/test_parity.py has tied embeddings.
@pytest.mark.parametrize(
    "kind",
    ["qwen3_moe", *slow(["gemma3", "phi3", "qwen2", "gemma2", *tiny.OTHERS])],
)
def test_other_families(kind, checkpoints, alpaca_file, plain_run, two_ranks):
    """Tied embeddings, caps, fused linears and experts, under all options that move parameters."""
    args = arguments(checkpoints(kind), alpaca_file, "bnb_dora", "--max_steps", "3")
    expected = plain_run([*args, *PLAIN])
    variant = ON_TWO["shard_grad_op, all else"].split()
    assert_same(expected, two_ranks(train_run, [*args, "--batch_size", "2", *variant])[0])


GROUPS, KEPT_IN_GROUPS, ADDED_UP = ON_FOUR


@pytest.mark.parametrize(
    ("train_type", "variant"),
    products(
        TYPES,
        ON_FOUR,
        always=[("hqq_dora", GROUPS)],
        # They meet everything except this mesh in two ranks, above.
        left_out=[*(t for t in TYPES if t != "hqq_dora"), KEPT_IN_GROUPS, ADDED_UP],
    ),
)
def test_four_ranks(train_type, variant, plain, four_ranks):
    args, expected = plain(train_type)
    options = ["--batch_size", "1", *ON_FOUR[variant].split()]
    if "--gradient_accumulation_steps" in options:  # twice the rows in a step: another plain run
        expected = four_ranks(
            train_run, [*args, "--batch_size", "2", "--use_gradient_checkpointing", "false"]
        )[0]
    assert_same(expected, four_ranks(train_run, [*args, *options])[0])


ALONE = [
    *((train_type, UNITS) for train_type in ("bnb_dora", "dora", "hqq_llama_pro")),
    *((train_type, KEPT) for train_type in ("full", "qlora", "hqq_lora", "bnb_llama_pro")),
    *((train_type, WHOLE) for train_type in ("lora", "hqq_dora", "llama_pro")),
]


@pytest.mark.parametrize(("train_type", "variant"), products(TYPES, VARIANTS, always=ALONE))
def test_one_rank(train_type, variant, plain, one_rank):
    args, expected = plain(train_type)
    assert_same(expected, one_rank(train_run, [*args, "--batch_size", "4", *VARIANTS[variant].split()])[0])


# The options have their effect, rather than none


def test_the_tables_are_the_options():
    assert {"auto", *STRATEGIES} == set(FIELDS["sharding_strategy"].metadata["choices"])
    assert set(WRAP_POLICIES) == set(FIELDS["wrap_policy"].metadata["choices"])


@pytest.mark.parametrize(
    ("strategy", "shape", "shares"),
    [
        ("full_shard", (4,), 4),
        ("shard_grad_op", (4,), 4),
        ("ddp", (4, 1), 1),
        ("hybrid_full_shard --hybrid_shard_size 2", (2, 2), 2),
        ("hybrid_shard_grad_op --hybrid_shard_size 2", (2, 2), 2),
    ],
)
def test_what_a_rank_holds(strategy, shape, shares, checkpoints, short_rows, four_ranks):
    args = arguments(checkpoints(), short_rows, "qlora", "--sharding_strategy", *strategy.split())
    for mesh, held, total in four_ranks(held_bytes, args):
        assert mesh == shape
        assert held == pytest.approx(total / shares, rel=0.03)


def held_bytes(rank_info, args) -> tuple[tuple, int, int]:
    """Return (shape of the mesh, bytes on this rank, bytes of the model)."""
    _, model = set_up(rank_info, args)
    params = list(model.parameters())
    held = sum(p.to_local().nbytes for p in params)
    return tuple(params[0].device_mesh.shape), held, sum(p.numel() * p.element_size() for p in params)


@pytest.mark.parametrize(("strategy", "gathered"), [("full_shard", 0), ("shard_grad_op", 3)])
def test_what_stays_gathered_after_forward(strategy, gathered, checkpoints, short_rows, two_ranks):
    args = arguments(checkpoints(), short_rows, "qlora", "--sharding_strategy", strategy)
    assert two_ranks(gathered_layers, args)[0] == gathered


def gathered_layers(rank_info, args) -> int:
    """Count the linears whose codes are still gathered after a forward."""
    _, model = set_up(rank_info, args)
    model(input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False)
    linears = [m for m in model.modules() if isinstance(m, Linear4bit)]
    return sum(type(m.codes.data) is torch.Tensor and m.codes.numel() * 8 == m.in_features * m.out_features
               for m in linears if m.in_features == 160)  # fmt: skip


@pytest.mark.parametrize(("policy", "largest"), [("layer", "all"), ("sublayer", "mlp")])
def test_units(policy, largest, checkpoints, short_rows, two_ranks):
    """The largest unit is a layer, or its MLP. With the prefetched unit, two layers or one are gathered."""
    args = arguments(checkpoints(), short_rows, "full", "--wrap_policy", policy)
    units, layer, mlp = two_ranks(unit_sizes, args)[0]
    assert max(units) == {"all": layer, "mlp": mlp}[largest]
    assert mlp < layer


def unit_sizes(rank_info, args) -> tuple[list[int], int, int]:
    """Return (parameters in each FSDP unit of a layer, in the layer, in its MLP)."""
    _, model = set_up(rank_info, args)
    layer = model.get_submodule("model.layers.1")
    units = [m for m in layer.modules() if hasattr(m, "_get_fsdp_state")]
    groups = [m._get_fsdp_state()._fsdp_param_group for m in units]
    sizes = [sum(p.sharded_param.numel() for p in g.fsdp_params) for g in groups]
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    return sizes, count(layer), next(count(m) for n, m in layer.named_modules() if n.endswith(".mlp"))


def test_every_unit_gets_the_offload_policy(checkpoints, short_rows, two_ranks):
    args = arguments(checkpoints(), short_rows, "bnb_dora", "--use_cpu_offload", "true")
    assert two_ranks(offload_policies, args)[0] == {"CPUOffloadPolicy"}
    assert two_ranks(offload_policies, args[:-2])[0] == {"OffloadPolicy"}


def offload_policies(rank_info, args) -> set[str]:
    """Return the names of the FSDP units' offload policies."""
    _, model = set_up(rank_info, args)
    states = [m._get_fsdp_state() for m in model.modules() if hasattr(m, "_get_fsdp_state")]
    return {type(s._fsdp_param_group.offload_policy).__name__ for s in states if s._fsdp_param_group}


def test_activation_offload_moves_the_layers_inputs_only(checkpoints, short_rows, one_rank):
    args = arguments(checkpoints(), short_rows, "bnb_dora", "--use_activation_cpu_offload", "true")
    assert one_rank(moved_shapes, args)[0] == [(2, 20, 64)] * 3  # of three layers


def moved_shapes(rank_info, args) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that activation offload moves in one step."""
    from parallel import activation_offload

    moved, original, smallest = [], HostActivations.pack, activation_offload.MIN_OFFLOAD_BYTES

    def pack(self, tensor):
        kept = original(self, tensor)
        moved.extend([tuple(tensor.shape)] * isinstance(kept, HostTensor))
        return kept

    HostActivations.pack, activation_offload.MIN_OFFLOAD_BYTES = pack, 0
    try:
        _, model = set_up(rank_info, args)
        ids = torch.ones(2, 20, dtype=torch.long, device=rank_info.device)
        model.train()(input_ids=ids, use_cache=False).logits.sum().backward()
    finally:
        HostActivations.pack, activation_offload.MIN_OFFLOAD_BYTES = original, smallest
    return moved


@pytest.mark.parametrize(
    "train_type", ["bnb_dora", *slow(["llama_pro", "qlora --lora_target_modules layers.2.self_attn.q_proj"])]
)
def test_activation_offload_keeps_nothing_after_a_step(train_type, checkpoints, short_rows, one_rank):
    """The same where the first layers are frozen, whose inputs backward never reads."""
    name, *more = train_type.split()
    args = arguments(
        checkpoints(biased_checkpoint(name)), short_rows, name, *more, "--use_activation_cpu_offload", "true"
    )
    assert one_rank(stashed_after_steps, args)[0] == [0, 0, 0]


def stashed_after_steps(rank_info, args) -> list[int]:
    """Count the layers' inputs that are still held after each of three steps."""
    import gc

    from parallel import activation_offload

    smallest, activation_offload.MIN_OFFLOAD_BYTES = activation_offload.MIN_OFFLOAD_BYTES, 0
    try:
        _, model = set_up(rank_info, args)
        held = []
        for _ in range(3):
            ids = torch.ones(2, 20, dtype=torch.long, device=rank_info.device)
            model.train()(input_ids=ids, use_cache=False).logits.sum().backward()
            gc.collect()
            held.append(sum(isinstance(o, HostTensor) for o in gc.get_objects()))
        return held
    finally:
        activation_offload.MIN_OFFLOAD_BYTES = smallest
