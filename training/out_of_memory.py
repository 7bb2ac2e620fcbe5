"""CUDA out of memory, told so that one knows what to do: where the memory went, phase by phase, and the options that
would help most, with what each would save.

What an option saves is the difference of two estimates, with it and without it; the estimate is the arithmetic of
docs/memory.md, for the weights that of monitoring/memory_model.py. It need not be exact for that: what is left out - the
allocator's rounding, NCCL's buffers, kernels' workspaces - is much the same in both.

B rows of a micro-batch, T tokens of the longest row, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from data.packing import longest_line
from launch.memory import PEAKS, size
from launch.precision import precision_here
from launch.ranks import Place
from models.loss import HIDDEN_BYTES, LOGITS_BYTES
from models.registry import FAMILIES, build_on_meta
from monitoring.memory_model import WeightBytes, plan, resting_on_host, vocabulary, weight_bytes
from options.config import METHODS, Config, shown
from options.errors import UserError
from training.job import Job
from wrapping import STRATEGIES

LAYER_ACTIVATIONS = (
    34  # values of a decoder layer, per token and hidden unit, while backward needs all of them
)
LOGITS = (
    7  # times the bytes of a chunk of logits, which come in fp32 as well, as exponentials and as gradients
)
# Bytes of an optimizer's states for each byte (4 for fp32) or, of 8-bit ones, for each trained weight.
STATES = {"sgd": 0.0, "paged_adamw_32bit": 0.0, "paged_adamw_8bit": 0.0}
STATE_BYTES_8BIT = 2.03
PACKED_INSTEAD = {"lora": "qlora", "custom_lora": "qlora", "dora": "bnb_dora", "full": "bnb_dora",
                  "llama_pro": "bnb_llama_pro"}  # fmt: skip
SHOWN = 3


@dataclass(frozen=True)
class Shape:
    """What of a job decides on its memory, besides its options. tokens: T; layer: bytes of the largest decoder layer,
    with what is trained in it; ends: of the embedding or the head where they are trained, else 0; on_host: of the
    embedding where it lies in host memory."""

    tokens: int
    hidden: int
    vocabulary: int
    layers: int
    heads: int
    eager: bool
    weights: WeightBytes
    layer: int
    ends: int
    on_host: int = 0


def measure(job: Job, config: Config) -> Shape:
    """The Shape of a job's model and data under other options. No memory is taken."""
    family, described = FAMILIES[job.model_config.model_type], job.model_config
    model = build_on_meta(described, family)
    parts = plan(model, family, config, precision_here(config.precision), job.files)
    layers: Counter[int | None] = Counter()
    for part in parts:
        layers[family.place(part.name)[0]] += part.nbytes()
    del layers[None]  # what is outside of them
    ends = [p for p in parts if p.name in vocabulary(family)]
    return Shape(
        tokens=longest_line(config, job.rows),
        hidden=described.hidden_size,
        vocabulary=described.vocab_size,
        layers=len(layers),
        heads=described.num_attention_heads,
        eager=family.attention == "eager",
        weights=weight_bytes(parts),
        layer=max(layers.values()),
        ends=max(p.nbytes() * (p.kind == "trained") for p in ends),
        on_host=sum(p.nbytes() for p in resting_on_host(parts, family, described.tie_word_embeddings)),
    )


def estimate(config: Config, shape: Shape) -> float:
    """Bytes that a GPU holds at the peak of a step. config: resolved, with its world_size."""
    precision, strategy = precision_here(config.precision), STRATEGIES[config.sharding_strategy]
    shards = strategy.shards(config.world_size, config.hybrid_shard_size)
    trained, everything = shape.weights.trained, shape.weights.total - shape.on_host
    if config.optimizer == "adamw_8bit":
        states = STATE_BYTES_8BIT * trained / precision.trained.itemsize
    else:
        states = STATES.get(config.optimizer, 2.0) * trained
    resident = 0 if config.use_cpu_offload else (everything + trained + states) / shards
    if config.no_sync and config.gradient_accumulation_steps > 1:
        resident += trained  # gradients that are not yet reduced
    gathered = everything if strategy.keep else shape.layer * (1 if config.wrap_policy == "sublayer" else 2)
    if shards == config.world_size == 1 and not config.use_cpu_offload:
        gathered = 0  # everything is there
    rows = config.batch_size * shape.tokens
    value = precision.frozen.itemsize
    inner = LAYER_ACTIVATIONS * rows * shape.hidden * precision.matmul.itemsize
    inner += 8 * shape.eager * shape.heads * rows * shape.tokens
    if config.use_gradient_checkpointing:
        kept = rows * shape.hidden * value * (2 if config.use_activation_cpu_offload else shape.layers)
    else:
        kept, inner = inner * shape.layers, 0
    chunk = min(LOGITS_BYTES, rows * shape.vocabulary * precision.matmul.itemsize)
    # A frozen head stays in its shards, and blocks of the hidden states of all its ranks come to each, with their
    # gradient in 16 bits and in fp32; a trained one is gathered.
    states = 2 * rows * shape.hidden * precision.matmul.itemsize
    if shards > 1 and not shape.ends:
        states += 2 * min(HIDDEN_BYTES, 4 * rows * shards * shape.hidden)
    loss = LOGITS * chunk + states + 2 * shape.ends
    return resident + kept + max(gathered + inner, loss + strategy.keep * gathered)


def changes(job: Job) -> list[dict]:
    """Options that could save memory where they are not as here, each with what has to change beside it."""
    config = job.config
    found: list[dict] = []
    if config.batch_size > 1:  # the same rows in each step, in more micro-batches: the very same training
        rows = config.batch_size * config.gradient_accumulation_steps
        found.append({"batch_size": 1, "gradient_accumulation_steps": rows})
    wanted = [{"use_gradient_checkpointing": True}, {"use_activation_cpu_offload": True}, {"use_cpu_offload": True},
              {"wrap_policy": "sublayer"}, {"sharding_strategy": "full_shard"}, {"no_sync": False},
              {"optimizer": "adamw_8bit"}]  # fmt: skip
    found += [change for change in wanted if any(getattr(config, k) != v for k, v in change.items())]
    if not config.use_gradient_checkpointing:
        found = [change for change in found if "use_activation_cpu_offload" not in change]
    if config.train_type in PACKED_INSTEAD and not job.files.prequantized:
        found.append({"train_type": PACKED_INSTEAD[config.train_type]})
    return [*found, {"context_length": max(longest_line(config, job.rows) // 2, 2)}]


def savings(job: Job) -> list[tuple[dict, float]]:
    """[(change, bytes less on the fullest GPU)], the largest first, without those that save nothing."""
    now = estimate(job.config, measure(job, job.config))
    found = []
    for change in changes(job):
        config = dataclasses.replace(job.config, **change)
        if METHODS[config.train_type].adapter and config.lora_rank is None:  # of full, which has no adapters
            config = dataclasses.replace(
                config, lora_rank=64, lora_alpha=16.0, lora_dropout=0.0, lora_target_modules="all"
            )
        found.append((change, now - estimate(config, measure(job, config))))
    return sorted((f for f in found if f[1] > 0), key=lambda f: -f[1])


def message(error: str, job: Job) -> str:
    """What to tell the user. error: torch's words."""
    numbers = re.findall(
        r"Tried to allocate [\d.]+ \w+|total capacity of [\d.]+ \w+|[\d.]+ \w+ is free", error
    )
    peaks = ", ".join(f"{phase} {size(peak)}" for phase, peak in PEAKS.by_phase.items()) or "none measured"
    helps = "; ".join(f"{_typed(change)} (about {size(gain)} less)" for change, gain in savings(job)[:SHOWN])
    told = f" ({'; '.join(numbers)})" if numbers else ""
    return f"CUDA out of memory in the phase: {PEAKS.phase}{told}. Peak by phase: {peaks}. Would help most: {helps}"


def _typed(change: dict) -> str:
    return " ".join(f"--{name} {shown(value)}" for name, value in change.items())


def explained(run: Callable[[Place, Job], None]) -> Callable[[Place, Job], None]:
    """run, with `message` as a UserError where the GPU's memory does not suffice."""

    @functools.wraps(run)
    def explaining(place: Place, job: Job) -> None:
        PEAKS.start()
        try:
            run(place, job)
        except RuntimeError as e:  # OutOfMemoryError of the allocator; others of the libraries beside it
            if not isinstance(e, torch.OutOfMemoryError) and not re.search(
                "CUDA.*out of memory|CUBLAS_STATUS_ALLOC", str(e)
            ):
                raise
            PEAKS.enter(PEAKS.phase)
            raise UserError(message(str(e), job)) from None

    return explaining
