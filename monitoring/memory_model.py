"""The model of memory: the bytes of the weights, checked after every load, and of a training step's peak.

The advice when memory runs out (training/out_of_memory.py) is the difference of two estimates. The weights'
bytes follow from the shapes in the checkpoint's headers, the train type, the quantizer, the precision and the
number of ranks. The arithmetic does not look at the parameters of the loaded model, so it does not share an
error in making or loading them: a weight that is not sharded, not packed, or of another dtype shows as a
difference.

T tokens of the longest sequence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from files.model_folder import CheckpointFiles
from launch import memory
from launch.memory import format_bytes
from launch.precision import Precision
from launch.ranks import RankInfo
from models.adapters import quantizer_from_config, target_linears
from models.family import Family
from models.llama_pro import new_layers
from models.loss import HIDDEN_BYTES, LOGITS_BYTES
from models.registry import build_on_meta
from options.config import Config
from quantization.layer import STORAGE
from wrapping import STRATEGIES

TOLERANCE = 0.03
ROUNDING_PER_TENSOR = 1024  # bytes: a GPU's allocator may round a tensor up by this much
# Values per token and hidden unit of a decoder layer's activations, while backward needs all of them.
LAYER_ACTIVATIONS = 34
# Bytes of the loss per byte of a chunk of logits, which exist in fp32, as exponentials and as gradients too.
BYTES_PER_LOGITS_BYTE = 7
# Optimizer states: bytes per byte of trained weights; 2 (two states in the weights' dtype) for all others.
OPTIMIZER_STATE_RATIOS = {"sgd": 0.0, "paged_adamw_32bit": 0.0, "paged_adamw_8bit": 0.0}
STATE_BYTES_8BIT = 2.03  # per trained weight


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a whole model's weights, by kind.

    Attributes:
        codes: packed weights.
        scales: the quantizer's scales.
        unquantized: embedding, head, norms and all else that is neither packed nor trained.
        trained: adapters, new blocks, or everything.
    """

    codes: int = 0
    scales: int = 0
    unquantized: int = 0
    trained: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    def __str__(self) -> str:
        parts = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}
        return " + ".join(f"{name} {format_bytes(n)}" for name, n in parts.items())


@dataclass(frozen=True)
class PlannedParameter:
    """A parameter that the loaded model should have.

    Attributes:
        name: the checkpoint's tensor that it comes from, or that it adapts.
        kind: a field of WeightBytes.
        shape: the full tensor's.
        itemsize: bytes of an element.
        is_padded: whether FSDP shards it, with padding; models/loss.py shards the vocabulary without.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    itemsize: int
    is_padded: bool = True

    def nbytes(self, shards: int = 1, index: int = 0) -> int:
        """Return the bytes that rank `index` allocates if `shards` ranks share it; by default, of all of it.

        FSDP cuts dimension 0 into equal shards, rounded up. The last ranks may have fewer rows, or none, but
        allocate as many.
        """
        rows = -(-self.shape[0] // shards)
        local_rows = rows if self.is_padded else min(rows, max(self.shape[0] - rows * index, 0))
        return local_rows * math.prod(self.shape[1:]) * self.itemsize


def plan_parameters(
    model: PreTrainedModel, family: Family, config: Config, precision: Precision, files: CheckpointFiles
) -> list[PlannedParameter]:
    """Return the parameters that the model must have once loaded, unsharded; a tied weight once.

    Args:
        model: from build_on_meta, before a method changes it; its parameters are not read.
        family: the model's family.
        config: the run's options: train type, quantizer and adapter settings.
        precision: dtypes of frozen and trained weights.
        files: shapes of the weights, and which of them are packed already.
    """
    method = config.method
    planned: list[PlannedParameter] = []
    added = new_layers(model.config) if method.expansion else []
    trains_all = not method.adapter and not method.expansion
    linears = {f"{name}.weight" for name, _ in family.layer_linears(model)}
    for name, stored in files.tensors.items():
        layer, _ = family.locate_layer(name)
        quantizer = None
        if files.prequantized:  # the checkpoint's makers chose
            quantizer = files.packed[name].quantizer if name in files.packed else None
        elif method.quantizer and name in linears and layer not in added:
            quantizer = quantizer_from_config(config)
        if quantizer:
            for kind, n_bytes in zip(("codes", "scales"), quantizer.packed_sizes(stored.shape), strict=True):
                shape = (-(-n_bytes // STORAGE.itemsize),)
                planned.append(PlannedParameter(name, kind, shape, STORAGE.itemsize))
        elif trains_all or layer in added or (config.train_embeddings and name in vocabulary_weights(family)):
            planned.append(PlannedParameter(name, "trained", stored.shape, precision.trained.itemsize))
        else:
            is_padded = name not in vocabulary_weights(family)
            itemsize = precision.frozen.itemsize
            planned.append(PlannedParameter(name, "unquantized", stored.shape, itemsize, is_padded))
    for linear in target_linears(model, family, config.lora_target_modules) if method.adapter else ():
        name, rank = f"{linear}.weight", config.lora_rank
        rows, columns = files.tensors[name].shape
        shapes = [(rank, columns), (rows, rank), *[(rows,)] * (method.adapter == "dora")]
        planned += [PlannedParameter(name, "trained", shape, precision.trained.itemsize) for shape in shapes]
        if method.adapter == "dora":
            # The squared norms are always fp32.
            planned.append(PlannedParameter(name, "unquantized", (rows,), itemsize=4))
    return planned


def vocabulary_weights(family: Family) -> tuple[str, str]:
    """Return the tensor names of the embedding and of the head: they have a row for each known token."""
    return f"{family.embedding}.weight", f"{family.head}.weight"


def weight_bytes(planned: Iterable[PlannedParameter]) -> WeightBytes:
    """Add up the bytes of the unsharded parameters by kind."""
    sizes = dict.fromkeys((f.name for f in fields(WeightBytes)), 0)
    for parameter in planned:
        sizes[parameter.kind] += parameter.nbytes()
    return WeightBytes(**sizes)


def host_parameters(
    planned: Iterable[PlannedParameter], family: Family, tied: bool
) -> list[PlannedParameter]:
    """Return what a GPU rank keeps in host memory: the embedding if it is neither trained nor tied, or []."""
    return [p for p in planned if p.name == f"{family.embedding}.weight" and p.kind != "trained" and not tied]


@dataclass(frozen=True)
class ExpectedMemory:
    """The memory that one rank's loaded weights should take.

    Attributes:
        total_weights: bytes of the whole model.
        trained: trained parameters of the whole model.
        on_gpu, on_host: bytes of this rank.
        n_tensors: parameters of this rank.
    """

    total_weights: WeightBytes
    trained: int
    on_gpu: int
    on_host: int
    n_tensors: int

    def describe(self) -> str:
        """Return the line about the weights: the whole model by kind, and this rank's bytes."""
        has_both = torch.cuda.is_available() and self.on_host
        on_host = f", of which {format_bytes(self.on_host)} in host memory" if has_both else ""
        weights, local = self.total_weights, format_bytes(self.on_gpu + self.on_host)
        total = f"{weights} = {format_bytes(weights.total)}"
        return f"model: {self.trained:,} trained parameters; {total}, {local} on this rank{on_host}"


def expected_memory(
    model: PreTrainedModel,
    family: Family,
    config: Config,
    precision: Precision,
    files: CheckpointFiles,
    rank_info: RankInfo,
) -> ExpectedMemory:
    """Return the memory that this rank's weights should take by the files' shapes and the options.

    Args:
        model, family: as for `plan_parameters`.
        config: the run's options: those that `plan_parameters` reads, sharding and CPU offload.
        precision, files: as for `plan_parameters`.
        rank_info: this process.
    """
    planned = plan_parameters(model, family, config, precision, files)
    if rank_info.device.type == "cpu" or config.use_cpu_offload:
        on_host = planned
    else:
        on_host = host_parameters(planned, family, model.config.tie_word_embeddings)
    shards = STRATEGIES[config.sharding_strategy].ranks_per_copy(rank_info.world, config.hybrid_shard_size)
    index = rank_info.rank % shards  # the ranks of a copy are consecutive
    total, host = (sum(p.nbytes(shards, index) for p in group) for group in (planned, on_host))
    trained = sum(math.prod(p.shape) for p in planned if p.kind == "trained")
    return ExpectedMemory(weight_bytes(planned), trained, total - host, host, len(planned))


def check_loaded(model: nn.Module, expected: ExpectedMemory, gpu_bytes_before: int) -> None:
    """Raise AssertionError unless this rank's weights take the expected memory, within TOLERANCE.

    In host memory the parameters' storages count. On a GPU all that was allocated since loading began counts,
    so that a copy that was not freed shows. gpu_bytes_before: bytes allocated on the GPU then.
    """
    held = [("host", memory.host_weight_bytes(model), expected.on_host, 0)]
    if expected.on_gpu:
        rounding = ROUNDING_PER_TENSOR * (expected.n_tensors + sum(1 for _ in model.buffers()))
        held.append(("GPU", memory.gpu_bytes_allocated() - gpu_bytes_before, expected.on_gpu, rounding))
    for where, found, wanted, rounding in held:
        assert abs(found - wanted) <= TOLERANCE * wanted + rounding, (
            f"the loaded weights take {format_bytes(found)} of {where} memory on this rank;"
            f" the checkpoint's shapes and the options say {format_bytes(wanted)}"
        )


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
    model_config: PretrainedConfig,
    family: Family,
    config: Config,
    precision: Precision,
    files: CheckpointFiles,
    tokens: int,
) -> RunSizes:
    """Return the sizes that determine the memory of a run with the options `config`; loads no weights.

    Args:
        model_config: the model's config.
        family: the model's family.
        config: the run's options, as for `plan_parameters`.
        precision: dtypes of frozen and trained weights.
        files: shapes of the weights, and which of them are packed already.
        tokens: T, tokens of the longest sequence: a row or, with --packing, a pack.
    """
    model = build_on_meta(model_config, family)
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


def estimate_peak(config: Config, precision: Precision, sizes: RunSizes) -> float:
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
