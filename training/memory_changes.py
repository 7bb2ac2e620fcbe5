"""The options that save memory, in the order of what they cost in speed: the one such table of the project.

plan.py proposes them where a run does not fit, training/out_of_memory.py when memory ran out. docs/plan.md
shows the table, with its sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from options.config import Config
from options.declaration import format_value
from options.strategies import STRATEGIES
from parallel.optimizers import UNPAGED

SHORTEST_CONTEXT = 512  # tokens; less would cut most rows of most data
# Tokens between the contexts of plans and of advice, a multiple of the kernels' tiles.
PLANNED_CONTEXT_STEP = 128
SMALLEST_RANK = 8
ADAMS = "adamw", "adam", "fused_adamw", "fused_adam"  # with two moments per weight in its own dtype

# Options that the memory of a run depends on. tests/training/test_planner.py compares them with those that
# are read.
MEMORY_OPTIONS = frozenset({
    "model_name", "llama_pro_path", "train_type", "preset", "adapter", "lora_rank", "lora_target_modules",
    "lora_dropout", "train_embeddings", "n_bits", "group_size", "context_length", "packing", "batch_size",
    "effective_batch_size", "gradient_accumulation_steps", "optimizer", "precision", "sharding_strategy",
    "hybrid_shard_size", "wrap_policy", "use_gradient_checkpointing", "activation_budget", "compile",
    "cuda_graphs", "use_cpu_offload", "use_activation_cpu_offload", "no_sync", "world_size", "save_every",
    "lora_expert_rank", "train_router", "save_minutes", "wd", "images", "image_size", "images_per_pack",
    "vision_bits", "vision_targets",
})  # fmt: skip

# Options that take some memory, which the model of memory does not count: for the input of dropout (it reads
# lora_dropout only for the projector of Gemma 3), for weights that are rounded without a kernel, for samples,
# for records, and in the host for tensors that are read at the same time.
NOT_COUNTED = frozenset({
    "lora_dropout", "base_matmul", "sample_every", "sample_tokens", "profile", "profile_memory",
    "loading_workers",
})  # fmt: skip


@dataclass(frozen=True)
class Situation:
    """What decides which changes are possible.

    Attributes:
        config: the options in use, resolved: sharding_strategy is not auto.
        tokens: of the longest row or, with --packing, of a pack.
        prequantized: whether the files hold packed weights.
        shortest: tokens of the shortest context to propose.
    """

    config: Config
    tokens: int
    prequantized: bool = False
    shortest: int = SHORTEST_CONTEXT


@dataclass(frozen=True)
class Change:
    """A change of options that can save memory.

    Attributes:
        option: the option that it is named by; it may change others too.
        costs: what it costs, in words.
        find_values: find_values(situation) yields {option: value}, from the mildest to the strongest; nothing
            if the change is in use or not possible.
        alters: whether the run then trains something else, not only slower.
        on_host: whether host memory holds what is saved.
    """

    option: str
    costs: str
    find_values: Callable[[Situation], Iterator[dict]]
    alters: bool = False
    on_host: bool = False


def _set(option: str, value, also: Callable[[Config], bool] = lambda config: True):
    """Return find_values of a Change that gives an option this value, where `also` allows it."""

    def find_values(situation: Situation) -> Iterator[dict]:
        if getattr(situation.config, option) != value and also(situation.config):
            yield {option: value}

    return find_values


def _smaller_batches(situation: Situation) -> Iterator[dict]:
    """Yield smaller batches in more micro-batches: the same rows in each step, so the very same training."""
    config = situation.config
    rows = config.batch_size * config.gradient_accumulation_steps
    for batch in range(config.batch_size - 1, 0, -1):
        if rows % batch == 0:
            yield {"batch_size": batch, "gradient_accumulation_steps": rows // batch}


def _halved(number: int, least: int) -> Iterator[int]:
    """Yield half of a number, a quarter and so on, down to `least`; nothing for 0."""
    while number and (number := number // 2) >= least:
        yield number


def _smaller_ranks(situation: Situation) -> Iterator[dict]:
    """Yield half of the rank, a quarter and so on; nothing for a saved adapter, whose rank is given."""
    config = situation.config
    rank = config.lora_rank if config.method.adapter and config.adapter is None else 0
    yield from ({"lora_rank": smaller} for smaller in _halved(rank, SMALLEST_RANK))


def _smaller_expert_ranks(situation: Situation) -> Iterator[dict]:
    """Yield half of the rank of the experts' adapters, a quarter and so on, and 0, which is none of them."""
    config = situation.config
    rank = config.lora_expert_rank if config.method.adapter and config.adapter is None else 0
    yield from ({"lora_expert_rank": smaller} for smaller in _halved(rank, 0))


def _fewer_images(situation: Situation) -> Iterator[dict]:
    """Yield half of the images of a pack, a quarter and so on: there are more packs, of the same rows."""
    config = situation.config
    images = config.images_per_pack if config.packing and config.has_images else 0
    yield from ({"images_per_pack": fewer} for fewer in _halved(images, 1))


def _full_shard(situation: Situation) -> Iterator[dict]:
    """Yield --sharding_strategy full_shard, without the size of groups that it does not have."""
    strategy = situation.config.sharding_strategy
    if strategy != "full_shard":
        in_groups = STRATEGIES[strategy].replicas == "groups"
        yield {"sharding_strategy": "full_shard"} | ({"hybrid_shard_size": -1} if in_groups else {})


def _packed_weights(situation: Situation) -> Iterator[dict]:
    """Yield the similar train type with 4-bit weights."""
    similar = situation.config.method.quantized_alternative
    if similar and not situation.prequantized:
        yield {"train_type": similar}


def _packed_tower(situation: Situation) -> Iterator[dict]:
    """Yield --vision_bits 4, for a tower that is not packed beside decoder layers that are."""
    config = situation.config
    can_pack = config.method.quantizer and not situation.prequantized and config.n_bits in (None, 4)
    if config.has_images and config.vision_bits == 16 and can_pack:
        yield {"vision_bits": 4}


def _host_weights(situation: Situation) -> Iterator[dict]:
    """Yield --use_cpu_offload, with an optimizer that is not paged: its states are in host memory anyway."""
    config = situation.config
    if not config.use_cpu_offload:
        unpaged = UNPAGED.get(config.optimizer)
        yield {"use_cpu_offload": True} | ({"optimizer": unpaged} if unpaged else {})


def _shorter_contexts(situation: Situation) -> Iterator[dict]:
    """Yield shorter contexts, in steps of PLANNED_CONTEXT_STEP."""
    longest = (situation.tokens - 1) // PLANNED_CONTEXT_STEP * PLANNED_CONTEXT_STEP
    for tokens in range(longest, situation.shortest - 1, -PLANNED_CONTEXT_STEP):
        yield {"context_length": tokens}


# From the cheapest. docs/plan.md has the reasons, and numbers where they are known.
CHANGES = (
    Change("no_sync", "more traffic: gradients are reduced in every micro-batch", _set("no_sync", False)),
    Change(
        "batch_size",
        "smaller matmuls and, on several GPUs, gathers in every micro-batch; trains the same",
        _smaller_batches,
    ),
    Change("images_per_pack", "more packs, with fewer images and tokens each", _fewer_images, alters=True),
    Change("sharding_strategy", "more traffic: weights are gathered in forward and in backward", _full_shard),
    Change("wrap_policy", "twice as many gathers, each half as large", _set("wrap_policy", "sublayer")),
    Change(
        "optimizer",
        "no time; Adam's moments are rounded to 8 bits",
        _set("optimizer", "adamw_8bit", lambda config: config.optimizer in ADAMS),
        alters=True,
    ),
    Change(
        "activation_budget",
        "kept results are computed again",
        _set("activation_budget", 0.0, lambda config: config.activation_budget > 0),
    ),
    Change(
        "cuda_graphs",
        "the GPU may wait for the host",
        _set("cuda_graphs", "false", lambda config: config.cuda_graphs == "true"),
    ),
    Change(
        "use_gradient_checkpointing",
        "a step takes about a third longer",
        _set("use_gradient_checkpointing", True),
    ),
    Change(
        "use_activation_cpu_offload",
        "copies of layer inputs to the host and back, while the GPU computes",
        _set("use_activation_cpu_offload", True, lambda config: config.use_gradient_checkpointing),
        on_host=True,
    ),
    Change(
        "vision_bits",
        "the vision tower's weights have 4 bits, dequantized in each block",
        _packed_tower,
        alters=True,
    ),
    Change(
        "lora_expert_rank",
        "no time; the experts' adapters can learn less, with 0 nothing",
        _smaller_expert_ranks,
        alters=True,
    ),
    Change("lora_rank", "no time; the adapter can learn less", _smaller_ranks, alters=True),
    Change(
        "train_type",
        "weights have 4 bits, dequantized in each layer; in place of full, an adapter is trained",
        _packed_weights,
        alters=True,
    ),
    Change(
        "use_cpu_offload",
        "a step takes about twice as long; host memory holds the weights",
        _host_weights,
        on_host=True,
    ),
)
# Costs no time, but data: longer rows are cut.
SHORTER_CONTEXT = Change("context_length", "longer rows are cut", _shorter_contexts, alters=True)


def as_arguments(options: dict) -> str:
    """Return {option: value} as it is typed on the command line."""
    return " ".join(f"--{name} {format_value(value)}" for name, value in options.items())
