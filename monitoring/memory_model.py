"""The one model of memory: what a run takes on each GPU, on the host, on the disk and between GPUs.

The planner (plan.py), the line that train.py prints at start, the trials of --batch_size auto and the advice
when memory runs out (training/out_of_memory.py) all use `estimate_memory`.

T tokens of the longest sequence.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from transformers import PreTrainedModel

from files.model_folder import CheckpointFiles
from launch.gpus import Gpu
from launch.precision import Precision
from models.family import Family
from models.loss import HIDDEN_BYTES, LOGITS_BYTES
from monitoring.weight_memory import (
    WeightBytes,
    host_parameters,
    plan_parameters,
    vocabulary_weights,
    weight_bytes,
)
from options.config import Config
from options.strategies import STRATEGIES

# Values per token and hidden unit of a decoder layer's activations, while backward needs all of them.
LAYER_ACTIVATIONS = 34
# Bytes of the loss per byte of a chunk of logits, which exist in fp32, as exponentials and as gradients too.
BYTES_PER_LOGITS_BYTE = 7
# Optimizer states: bytes per byte of trained weights; 2 (two states in the weights' dtype) for all others.
OPTIMIZER_STATE_RATIOS = {"sgd": 0.0, "paged_adamw_32bit": 0.0, "paged_adamw_8bit": 0.0}
STATE_BYTES_8BIT = 2.03  # per trained weight


@dataclass(frozen=True)
class RunSizes:
    """The sizes of a run's model and data; with the options they determine its memory.

    Attributes:
        tokens: T.
        eager: whether attention is eager, which keeps its scores.
        weights: bytes of the whole model.
        layer: bytes of the largest decoder layer, with its trained parameters.
        vocabulary_bytes: bytes of the embedding or the head if they are trained, else 0.
        on_host: bytes of the embedding if it is in host memory, else 0.
    """

    tokens: int
    hidden: int
    vocabulary: int
    layers: int
    heads: int
    eager: bool
    weights: WeightBytes
    layer: int
    vocabulary_bytes: int
    on_host: int = 0


def run_sizes(
    model: PreTrainedModel,
    family: Family,
    config: Config,
    precision: Precision,
    files: CheckpointFiles,
    tokens: int,
) -> RunSizes:
    """Return the sizes that determine the memory of a run with the options `config`; loads no weights.

    Args:
        model: from build_on_meta, before a method changes it; not changed, so one serves for many options.
        family: the model's family.
        config: the run's options, as for `plan_parameters`.
        precision: dtypes of frozen and trained weights.
        files: shapes of the weights, and which of them are packed already.
        tokens: T, tokens of the longest sequence: a row or, with --packing, a pack.
    """
    model_config = model.config
    planned = plan_parameters(model, family, config, precision, files)
    layer_bytes: Counter[int | None] = Counter()
    for p in planned:
        layer_bytes[family.locate_layer(p.name)[0]] += p.nbytes()
    del layer_bytes[None]  # parameters outside of the layers
    vocabulary = [p for p in planned if p.name in vocabulary_weights(family)]
    return RunSizes(
        tokens=tokens,
        hidden=model_config.hidden_size,
        vocabulary=model_config.vocab_size,
        layers=len(layer_bytes),
        heads=model_config.num_attention_heads,
        eager=family.attention == "eager",
        weights=weight_bytes(planned),
        layer=max(layer_bytes.values()),
        vocabulary_bytes=max(p.nbytes() * (p.kind == "trained") for p in vocabulary),
        on_host=sum(p.nbytes() for p in host_parameters(planned, family, model_config.tie_word_embeddings)),
    )


def layer_input_bytes(config: Config, precision: Precision, tokens: int, hidden: int) -> int:
    """Return the bytes of one layer's input, which gradient checkpointing saves.

    Args:
        config: the run's options.
        precision: dtypes of the run.
        tokens: T.
        hidden: features of a token.
    """
    return config.batch_size * tokens * hidden * precision.frozen.itemsize


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run takes: on the GPU of the fullest rank, and in the host memory of a node.

    Attributes:
        load: on the GPU after the load.
        forward, backward: after a forward, and after a backward, once the optimizer has its states.
        optimizer: most while the optimizer updates the weights.
        peak: most of all.
        host: of all processes of a node together.
    """

    load: float
    forward: float
    backward: float
    optimizer: float
    peak: float
    host: float


def estimate_memory(config: Config, precision: Precision, sizes: RunSizes, gpu: Gpu | None) -> MemoryEstimate:
    """Estimate the memory that a run takes.

    Args:
        config: resolved, with its world_size.
        precision: dtypes of the run.
        sizes: of its model and data.
        gpu: the kind of its GPUs; None for a run on CPUs, whose weights are in host memory.
    """
    peak = _estimate_peak(config, precision, sizes)
    return MemoryEstimate(peak, peak, peak, peak, peak, 0)


def _estimate_peak(config: Config, precision: Precision, sizes: RunSizes) -> float:
    """Estimate the bytes that each GPU holds at the peak of a training step.

    config: resolved, with its world_size.
    """
    strategy = STRATEGIES[config.sharding_strategy]
    shards = strategy.ranks_per_copy(config.world_size, config.hybrid_shard_size)
    trained, weights = sizes.weights.trained, sizes.weights.total - sizes.on_host
    if config.optimizer == "adamw_8bit":
        optimizer_states = STATE_BYTES_8BIT * trained / precision.trained.itemsize
    else:
        optimizer_states = OPTIMIZER_STATE_RATIOS.get(config.optimizer, 2.0) * trained
    resident = 0 if config.use_cpu_offload else (weights + trained + optimizer_states) / shards
    if config.no_sync and config.gradient_accumulation_steps > 1:
        resident += trained  # gradients that are not reduced yet
    if strategy.reshard_after_forward:
        gathered = sizes.layer * (1 if config.wrap_policy == "sublayer" else 2)
    else:
        gathered = weights
    if shards == config.world_size == 1 and not config.use_cpu_offload:
        gathered = 0  # nothing is sharded
    rows = config.batch_size * sizes.tokens
    matmul_bytes = precision.matmul_dtype.itemsize
    activations = LAYER_ACTIVATIONS * rows * sizes.hidden * matmul_bytes
    activations += 8 * sizes.eager * sizes.heads * rows * sizes.tokens
    if config.use_gradient_checkpointing:
        saved_layers = 2 if config.use_activation_cpu_offload else sizes.layers
        saved = layer_input_bytes(config, precision, sizes.tokens, sizes.hidden) * saved_layers
    else:
        saved, activations = activations * sizes.layers, 0
    logits_chunk = min(LOGITS_BYTES, rows * sizes.vocabulary * matmul_bytes)
    # A frozen head stays sharded: each rank gets all ranks' hidden states, a block at a time, with their
    # gradients in 16 bits and in fp32. A trained head is gathered.
    hidden_states = 2 * rows * sizes.hidden * matmul_bytes
    if shards > 1 and not sizes.vocabulary_bytes:
        hidden_states += 2 * min(HIDDEN_BYTES, 4 * rows * shards * sizes.hidden)
    loss = BYTES_PER_LOGITS_BYTE * logits_chunk + hidden_states + 2 * sizes.vocabulary_bytes
    gathered_in_loss = 0 if strategy.reshard_after_forward else gathered
    return resident + saved + max(gathered + activations, loss + gathered_in_loss)
