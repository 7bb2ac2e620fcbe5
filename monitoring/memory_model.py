"""The one model of memory: what weights take, checked after every load, and what a step takes at its peak.

Advice when memory runs out (training/out_of_memory.py) is the difference of two of its estimates. The weights' figure
comes from the shapes in the checkpoint's headers, the train type, the quantizer, the precision and the
number of ranks. No parameter of the model that was made and loaded is asked, so that an error in making or loading it
is none of the arithmetic's: a weight that is not sharded or not packed, or has another dtype, shows as a difference.

T tokens of the longest row.
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
PER_TENSOR = 1024  # bytes: what a GPU's allocator may round one tensor up by
LAYER_ACTIVATIONS = (
    34  # values of a decoder layer, per token and hidden unit, while backward needs all of them
)
LOGITS = (
    7  # times the bytes of a chunk of logits, which come in fp32 as well, as exponentials and as gradients
)
# Bytes of an optimizer's states for each byte (4 for fp32) or, of 8-bit ones, for each trained weight.
STATES = {"sgd": 0.0, "paged_adamw_32bit": 0.0, "paged_adamw_8bit": 0.0}
STATE_BYTES_8BIT = 2.03


@dataclass(frozen=True)
class WeightBytes:
    """Of a whole model, by kind. unquantized: embedding, head, norms and what else is neither packed nor
    trained; trained: adapters, new blocks, or everything."""

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
class Part:
    """A parameter as it should be. name: of the checkpoint's tensor that it comes from, or belongs to; kind: of
    WeightBytes; shape: over all ranks; itemsize: bytes of an element; padded: whether FSDP shards it, or models/loss.py."""

    name: str
    kind: str
    shape: tuple[int, ...]
    itemsize: int
    padded: bool = True

    def nbytes(self, shards: int = 1, index: int = 0) -> int:
        """Of rank `index` of the `shards` that share a copy. FSDP's rule: dimension 0 in equal parts, rounded up, so
        that the last ranks may have less, or nothing, but room for as much."""
        rows = -(-self.shape[0] // shards)
        mine = rows if self.padded else min(rows, max(self.shape[0] - rows * index, 0))
        return mine * math.prod(self.shape[1:]) * self.itemsize


def plan(
    model: PreTrainedModel, family: Family, config: Config, precision: Precision, files: CheckpointFiles
) -> list[Part]:
    """Every parameter of the train type; a tied weight once. model: as build_on_meta makes it, before any method; only
    the names of its linears are read."""
    method, parts = config.method, []
    new = new_layers(model.config) if method.expansion else []
    everything = not method.adapter and not method.expansion
    linears = {f"{name}.weight" for name, _ in family.layer_linears(model)}
    for name, stored in files.tensors.items():
        layer, _ = family.locate_layer(name)
        quantizer = None
        if files.prequantized:  # as its makers chose
            quantizer = files.packed[name].quantizer if name in files.packed else None
        elif method.quantizer and name in linears and layer not in new:
            quantizer = quantizer_from_config(config)
        if quantizer:
            for kind, n_bytes in zip(("codes", "scales"), quantizer.packed_sizes(stored.shape), strict=True):
                parts.append(Part(name, kind, (-(-n_bytes // STORAGE.itemsize),), STORAGE.itemsize))
        elif everything or layer in new:
            parts.append(Part(name, "trained", stored.shape, precision.trained.itemsize))
        else:
            padded = name not in vocabulary(family)
            parts.append(Part(name, "unquantized", stored.shape, precision.frozen.itemsize, padded))
    for linear in target_linears(model, family, config.lora_target_modules) if method.adapter else ():
        name, rank = f"{linear}.weight", config.lora_rank
        rows, columns = files.tensors[name].shape
        shapes = [(rank, columns), (rows, rank), *[(rows,)] * (method.adapter == "dora")]
        parts += [Part(name, "trained", shape, precision.trained.itemsize) for shape in shapes]
        if method.adapter == "dora":
            parts.append(Part(name, "unquantized", (rows,), 4))  # the squared norms, fp32 always
    return parts


def vocabulary(family: Family) -> tuple[str, str]:
    """The names of the weights that have a row for each token."""
    return f"{family.embedding}.weight", f"{family.head}.weight"


def weight_bytes(parts: Iterable[Part]) -> WeightBytes:
    sizes = dict.fromkeys((f.name for f in fields(WeightBytes)), 0)
    for part in parts:
        sizes[part.kind] += part.nbytes()
    return WeightBytes(**sizes)


def resting_on_host(parts: Iterable[Part], family: Family, tied: bool) -> list[Part]:
    """What a GPU leaves in host memory: an embedding that is neither trained nor the head's."""
    return [p for p in parts if p.name == f"{family.embedding}.weight" and p.kind != "trained" and not tied]


@dataclass(frozen=True)
class Share:
    """What one rank should hold. whole: the model, of which it is a part; trained: parameters of the whole model that
    are trained; on_gpu, on_host: bytes of this rank; tensors: how many these are."""

    whole: WeightBytes
    trained: int
    on_gpu: int
    on_host: int
    tensors: int

    def describe(self) -> str:
        """The line about the weights: of the whole model by kind, and of this rank."""
        on_gpus = torch.cuda.is_available() and self.on_host
        where = f", of which {format_bytes(self.on_host)} in host memory" if on_gpus else ""
        return (
            f"model: {self.trained:,} trained parameters; {self.whole} = {format_bytes(self.whole.total)},"
            f" {format_bytes(self.on_gpu + self.on_host)} on this rank{where}"
        )


def expect(
    model: PreTrainedModel,
    family: Family,
    config: Config,
    precision: Precision,
    files: CheckpointFiles,
    rank_info: RankInfo,
) -> Share:
    """Of this rank. Arguments as for `plan`, which must come before the model is changed."""
    parts = plan(model, family, config, precision, files)
    if rank_info.device.type == "cpu" or config.use_cpu_offload:
        on_host = parts
    else:
        on_host = resting_on_host(parts, family, model.config.tie_word_embeddings)
    shards = STRATEGIES[config.sharding_strategy].ranks_per_copy(rank_info.world, config.hybrid_shard_size)
    index = rank_info.rank % shards  # ranks of a copy follow one another
    total, host = (sum(p.nbytes(shards, index) for p in held) for held in (parts, on_host))
    trained = sum(math.prod(p.shape) for p in parts if p.kind == "trained")
    return Share(weight_bytes(parts), trained, total - host, host, len(parts))


def check_loaded(model: nn.Module, expected: Share, before: int) -> None:
    """Raises AssertionError unless the rank holds what it should, within TOLERANCE: in host memory by the storage of
    its parameters, on a GPU by all that was allocated since `before`, so that a copy that was not freed shows there."""
    held = [("host", memory.host_weight_bytes(model), expected.on_host, 0)]
    if expected.on_gpu:
        rounding = PER_TENSOR * (expected.tensors + sum(1 for _ in model.buffers()))
        held.append(("GPU", memory.gpu_bytes_allocated() - before, expected.on_gpu, rounding))
    for where, found, wanted, rounding in held:
        assert abs(found - wanted) <= TOLERANCE * wanted + rounding, (
            f"the loaded weights take {format_bytes(found)} of {where} memory on this rank; the checkpoint's shapes and the"
            f" options say {format_bytes(wanted)}"
        )


@dataclass(frozen=True)
class Shape:
    """What of a run decides on its memory, besides its options. tokens: T; layer: bytes of the largest decoder layer,
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


def measure(
    described: PretrainedConfig,
    family: Family,
    config: Config,
    precision: Precision,
    files: CheckpointFiles,
    tokens: int,
) -> Shape:
    """The Shape of a model and data under the options `config`. described: the model's config; tokens: of the longest
    row. No memory is taken."""
    model = build_on_meta(described, family)
    parts = plan(model, family, config, precision, files)
    layers: Counter[int | None] = Counter()
    for part in parts:
        layers[family.locate_layer(part.name)[0]] += part.nbytes()
    del layers[None]  # what is outside of them
    ends = [p for p in parts if p.name in vocabulary(family)]
    return Shape(
        tokens=tokens,
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


def estimate(config: Config, precision: Precision, shape: Shape) -> float:
    """Bytes that a GPU holds at the peak of a step. config: resolved, with its world_size."""
    strategy = STRATEGIES[config.sharding_strategy]
    shards = strategy.ranks_per_copy(config.world_size, config.hybrid_shard_size)
    trained, everything = shape.weights.trained, shape.weights.total - shape.on_host
    if config.optimizer == "adamw_8bit":
        states = STATE_BYTES_8BIT * trained / precision.trained.itemsize
    else:
        states = STATES.get(config.optimizer, 2.0) * trained
    resident = 0 if config.use_cpu_offload else (everything + trained + states) / shards
    if config.no_sync and config.gradient_accumulation_steps > 1:
        resident += trained  # gradients that are not yet reduced
    gathered = (
        everything
        if strategy.keeps_gathered
        else shape.layer * (1 if config.wrap_policy == "sublayer" else 2)
    )
    if shards == config.world_size == 1 and not config.use_cpu_offload:
        gathered = 0  # everything is there
    rows = config.batch_size * shape.tokens
    value = precision.frozen.itemsize
    inner = LAYER_ACTIVATIONS * rows * shape.hidden * precision.matmul_dtype.itemsize
    inner += 8 * shape.eager * shape.heads * rows * shape.tokens
    if config.use_gradient_checkpointing:
        kept = rows * shape.hidden * value * (2 if config.use_activation_cpu_offload else shape.layers)
    else:
        kept, inner = inner * shape.layers, 0
    chunk = min(LOGITS_BYTES, rows * shape.vocabulary * precision.matmul_dtype.itemsize)
    # A frozen head stays in its shards, and blocks of the hidden states of all its ranks come to each, with their
    # gradient in 16 bits and in fp32; a trained one is gathered.
    states = 2 * rows * shape.hidden * precision.matmul_dtype.itemsize
    if shards > 1 and not shape.ends:
        states += 2 * min(HIDDEN_BYTES, 4 * rows * shards * shape.hidden)
    loss = LOGITS * chunk + states + 2 * shape.ends
    return resident + kept + max(gathered + inner, loss + strategy.keeps_gathered * gathered)
