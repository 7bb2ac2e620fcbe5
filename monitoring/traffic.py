"""The bytes that cross between GPUs, and between a GPU and its host, in one optimizer step: for plans.

They follow from the units of FSDP (wrapping.py), the sharded vocabulary (models/loss.py) and the offloads.
Reductions count as in a ring: of n bytes over W ranks a rank receives (W - 1) / W n in a reduce-scatter, and
twice as much in an all-reduce. It sends as much as it receives. Left out: norms, metrics and token ids, which
take some kilobytes, and what paged optimizers move when a GPU is full.

Shapes: B rows of a micro-batch, T tokens of a row, H hidden units, W ranks that share a copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

from transformers import PreTrainedModel

from files.config_parts import text_config
from files.weight_headers import WeightHeaders
from launch.gpus import Gpu
from launch.precision import Precision
from models.family import Family
from models.vision import Vision
from monitoring.layer_memory import is_compiled, layer_widths
from monitoring.vision_memory import pixel_bytes
from monitoring.weight_memory import PlannedParameter, plan_parameters, vocabulary_weights
from options.config import Config
from options.strategies import STRATEGIES, shards_of

INT64, FP32 = 8, 4  # bytes
STATISTICS_BYTES = 3 * FP32  # of a token's logits, in models/loss.py


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank in an optimizer step, with all its micro-batches.

    Attributes:
        weights: that it receives from other GPUs, and sends to them, to gather the units.
        gradients: the same, to reduce the gradients.
        vocabulary: the same, for a sharded embedding and head: hidden states, their gradients, statistics.
        to_gpu, to_host: between its GPU and host memory.
    """

    weights: float = 0
    gradients: float = 0
    vocabulary: float = 0
    to_gpu: float = 0
    to_host: float = 0

    @property
    def between_gpus(self) -> float:
        """Bytes that the rank receives from other GPUs; it sends as many."""
        return self.weights + self.gradients + self.vocabulary

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> Traffic:
        return Traffic(*(getattr(self, f.name) * times for f in fields(self)))


@dataclass
class Unit:
    """A unit of FSDP: what it gathers for a forward or a backward.

    Attributes:
        parameters: its parameters.
        gather_size: bytes of an element of a trained parameter when it is gathered; None: its own.
        in_backward: whether it is gathered in backward too.
    """

    parameters: list[PlannedParameter] = field(default_factory=list)
    gather_size: int | None = None
    in_backward: bool = True

    @property
    def is_trained(self) -> bool:
        """Whether it has trained parameters."""
        return any(p.kind == "trained" for p in self.parameters)

    def shard_bytes(self, shards: int) -> int:
        """Return the bytes of a rank's shard."""
        return sum(p.nbytes(shards) for p in self.parameters)

    def sent_bytes(self, shards: int) -> int:
        """Return the bytes of a rank's shard in the dtypes in which it is gathered."""
        size = self.gather_size
        return sum((replace(p, itemsize=size) if size else p).nbytes(shards) for p in self.parameters)

    def gradient_elements(self, shards: int) -> int:
        """Return the elements of a rank's shard of the gradients, with padding."""
        trained = (p for p in self.parameters if p.kind == "trained")
        return sum(replace(p, itemsize=1).nbytes(shards) for p in trained)


def step_traffic(
    model: PreTrainedModel,
    family: Family,
    config: Config,
    precision: Precision,
    files: WeightHeaders,
    tokens: int,
    targets: int | None = None,
    gpu: Gpu | None = None,
    pixels: int = 0,
) -> Traffic:
    """Return the traffic of one optimizer step of a rank.

    Args:
        model: from build_on_meta, before a method changes it; not changed.
        family: the model's family.
        config: the run's options, resolved, with its world_size.
        precision: dtypes of the run.
        files: shapes of the weights, and which of them are packed already.
        tokens: T of each micro-batch, with padding.
        targets: learned tokens of a micro-batch of a rank; None: all of its B * T.
        gpu: the kind of the GPUs; None: CPU ranks, which have no memory but the host's.
        pixels: of the resized images of a sequence.
    """
    planned = plan_parameters(model, family, config, precision, files)
    shards = shards_of(config)
    n_tokens, tied = config.batch_size * tokens, model.config.tie_word_embeddings
    step = _Step(
        config=config,
        precision=precision,
        gpu=gpu,
        shards=shards,
        copies=config.world_size // shards,
        n_tokens=n_tokens,
        n_targets=n_tokens if targets is None else targets,
        hidden=text_config(model.config).hidden_size,
        tied=tied,
        compiled=is_compiled(config, layer_widths(model, family), gpu),
    )
    units = list_units(planned, family, config, precision, tied)
    frozen = {p.name: p for p in planned if p.name in vocabulary_weights(family) and p.kind != "trained"}
    if not pixels:  # in a micro-batch without an image the tower is not gathered
        units = [unit for unit in units if not family.is_of_vision(unit.parameters[0].name)]
    micro_batch = step.gathers(units) + step.vocabulary(frozen, family)
    micro_batch += Traffic(to_gpu=pixel_bytes(config, pixels) if gpu else 0)
    micro_batch += step.activations(_count_backward_layers(planned, family))
    syncs = 1 if config.no_sync else config.gradient_accumulation_steps
    return micro_batch * config.gradient_accumulation_steps + step.gradients(units) * syncs


def list_units(
    planned: Iterable[PlannedParameter], family: Family, config: Config, precision: Precision, tied: bool
) -> list[Unit]:
    """Return FSDP's units in the order in which their forwards end, as `wrap` of wrapping.py makes them.

    Args:
        planned: the model's parameters; a frozen embedding or head is in no unit.
        family: the model's family.
        config: the run's options.
        precision: dtypes of the run.
        tied: whether embedding and head are one parameter.
    """
    embedding, head = vocabulary_weights(family)
    planned = list(planned)
    trains_head = any(p.name == head and p.kind == "trained" for p in planned)
    inner = family.sublayers if config.wrap_policy == "sublayer" else ()
    vision = family.built_vision()
    units: dict[tuple, Unit] = {}
    for p in planned:
        layer, name = family.locate_layer(p.name)
        if p.name in (embedding, head) and p.kind != "trained":
            continue
        if vision and family.is_of_vision(p.name):
            key: tuple = (0, *_place_in_tower(p.name, vision))  # between embedding and layers
        elif layer is not None:
            part = next((i for i, each in enumerate(inner) if name.startswith(f"{each}.")), len(inner))
            key = (1, layer, part)
        else:
            with_head = p.name == head or (trains_head and p.name == f"{family.head}.bias")
            key = (3,) if tied else (0,) if p.name == embedding else (2,) if with_head else (3,)
        units.setdefault(key, Unit()).parameters.append(p)
    ordered = [units[key] for key in sorted(units)]
    cast_size = precision.gather_dtype.itemsize if precision.gather_dtype else None
    for unit in ordered:
        has_vocabulary = any(p.name == embedding for p in unit.parameters)
        if has_vocabulary or all(p.kind == "trained" for p in unit.parameters):
            unit.gather_size = cast_size
    # Backward ends at the first unit that is trained; FSDP prefetches the one before it all the same.
    first = next(i for i, unit in enumerate(ordered) if unit.is_trained)
    if not any(p.name == embedding for unit in ordered for p in unit.parameters):
        for unit in ordered[: max(first - 1, 0)]:
            unit.in_backward = False
    return ordered


def _place_in_tower(name: str, vision: Vision) -> tuple[int, int]:
    """Return the place, in forward, of the unit of a tensor of the vision parts: blocks come first."""
    unit = vision.unit_of(name)
    if unit in vision.parts:
        return 1, vision.parts.index(unit)
    return 0, int(unit.rpartition(".")[2])


def _count_backward_layers(planned: Iterable[PlannedParameter], family: Family) -> int:
    """Return the number of decoder layers that backward reaches: those from the first trained one on."""
    embedding, _ = vocabulary_weights(family)
    trained = [(p.name, family.locate_layer(p.name)[0]) for p in planned if p.kind == "trained"]
    count = 1 + max(i for p in planned if (i := family.locate_layer(p.name)[0]) is not None)
    reaches_all = any(name == embedding or family.is_of_vision(name) for name, _ in trained)
    return count if reaches_all else count - min(i for _, i in trained if i is not None)


@dataclass(frozen=True)
class _Step:
    """A step's options and sizes, and the traffic of its parts.

    Attributes:
        config, precision, gpu: as for `step_traffic`.
        shards: W.
        copies: copies of the model.
        n_tokens, n_targets: of a micro-batch of a rank, with padding, and learned.
        hidden: H.
        tied: whether embedding and head are one parameter.
        compiled: whether the layers are.
    """

    config: Config
    precision: Precision
    gpu: Gpu | None
    shards: int
    copies: int
    n_tokens: int
    n_targets: int
    hidden: int
    tied: bool
    compiled: bool

    def gathers(self, units: list[Unit]) -> Traffic:
        """Return the traffic of gathering the units in a micro-batch."""
        twice = STRATEGIES[self.config.sharding_strategy].reshard_after_forward
        weights = to_gpu = 0
        for unit in units:
            times = 2 if twice and unit.in_backward else 1
            weights += times * (self.shards - 1) * unit.sent_bytes(self.shards)
            to_gpu += times * unit.shard_bytes(self.shards)
        return Traffic(weights=weights, to_gpu=to_gpu if self._offloads_weights else 0)

    def gradients(self, units: list[Unit]) -> Traffic:
        """Return the traffic of reducing the gradients once, in fp32: over W ranks, then over the copies."""
        elements = sum(unit.gradient_elements(self.shards) for unit in units)
        ring = self.shards - 1 + 2 * (self.copies - 1) / self.copies
        to_host = elements * self.precision.trained.itemsize if self._offloads_weights else 0
        return Traffic(gradients=ring * elements * FP32, to_host=to_host)

    def vocabulary(self, frozen: Mapping[str, PlannedParameter], family: Family) -> Traffic:
        """Return the traffic of a frozen embedding and head in a micro-batch.

        frozen: {name: parameter} of those that are frozen; tied ones are one parameter.
        """
        embedding, head = vocabulary_weights(family)
        looked_up = frozen.get(embedding)
        projected = looked_up if self.tied else frozen.get(head)
        others, received, to_gpu = self.shards - 1, 0, 0
        if looked_up:
            row = self.hidden * looked_up.itemsize
            received += others * self.n_tokens * (INT64 + row)
            if self.gpu and (self._offloads_weights or not self.tied):  # the embedding is in host memory
                # Triton's kernel reads the rows that are needed; else each rank looks up the tokens of all.
                to_gpu += self.n_tokens * row * (1 if self.gpu.runs_triton else self.shards)
        if projected:
            states = self.hidden * (self.precision.matmul_dtype.itemsize + FP32)  # and their gradients
            received += others * self.n_targets * (INT64 + states + self.shards * STATISTICS_BYTES)
            to_gpu += projected.nbytes(self.shards) if self._offloads_weights else 0
        return Traffic(vocabulary=received, to_gpu=to_gpu)

    def activations(self, layers: int) -> Traffic:
        """Return the traffic of activations that are kept in host memory in a micro-batch.

        layers: decoder layers that backward reaches.
        """
        config, saved = self.config, 0
        if config.use_activation_cpu_offload:
            saved += self.precision.frozen.itemsize
        if self._offloads_outputs:
            saved += self.precision.matmul_dtype.itemsize
        n_bytes = saved * layers * self.n_tokens * self.hidden if self.gpu else 0
        return Traffic(to_gpu=n_bytes, to_host=n_bytes)

    @property
    def _offloads_weights(self) -> bool:
        return self.config.use_cpu_offload and self.gpu is not None

    @property
    def _offloads_outputs(self) -> bool:
        """Return whether compiled 4-bit DoRA layers keep the output of their last projection on the host."""
        config = self.config
        is_4bit_dora = config.method.adapter == "dora" and config.method.quantizer is not None
        whole_layers = config.wrap_policy == "layer" and config.use_gradient_checkpointing
        return self.compiled and is_4bit_dora and whole_layers and not config.use_cpu_offload
