"""The bytes of the weights by the files' shapes and the options, and their check after every load.

They follow from the shapes in the checkpoint's headers, the train type, the quantizer, the precision and the
number of ranks. The arithmetic does not look at the parameters of the loaded model, so it does not share an
error in making or loading them: a weight that is not sharded, not packed, or of another dtype shows as a
difference. memory_model.py adds what a training step takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from files.weight_headers import WeightHeaders
from launch import memory
from launch.memory import format_bytes
from launch.precision import Precision
from launch.ranks import RankInfo
from models.adapters import adapted_linears, quantizer_from_config
from models.family import Family
from models.llama_pro import new_layers
from models.moe import find_stack
from models.routers import router_parameters
from models.vision_parts import packed_vision_linears, vision_linears, vision_matrices
from monitoring.sizes import WeightBytes
from options.config import Config
from options.strategies import STRATEGIES
from quantization.layer import STORAGE

TOLERANCE = 0.03
ROUNDING_PER_TENSOR = 1024  # bytes: a GPU's allocator may round a tensor up by this much


@dataclass(frozen=True)
class PlannedParameter:
    """A parameter that the loaded model should have.

    Attributes:
        name: the checkpoint's tensor that it comes from, or that it adapts; of a stack, the first one.
        kind: a field of WeightBytes.
        shape: the full tensor's.
        itemsize: bytes of an element.
        is_padded: whether FSDP shards it, with padding; models/loss.py shards the vocabulary without.
        is_sharded: False if each rank has all of it, on its GPU (`Family.fixed_parameters`).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    itemsize: int
    is_padded: bool = True
    is_sharded: bool = True

    def nbytes(self, shards: int = 1, index: int = 0) -> int:
        """Return the bytes that rank `index` allocates if `shards` ranks share it; by default, of all of it.

        FSDP cuts dimension 0 into equal shards, rounded up. The last ranks may have fewer rows, or none, but
        allocate as many.
        """
        shards = shards if self.is_sharded else 1
        rows = -(-self.shape[0] // shards)
        local_rows = rows if self.is_padded else min(rows, max(self.shape[0] - rows * index, 0))
        return local_rows * math.prod(self.shape[1:]) * self.itemsize


def plan_parameters(
    model: PreTrainedModel, family: Family, config: Config, precision: Precision, files: WeightHeaders
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
    of_vision = packed_vision_linears(model, family, config, files.prequantized)
    linears = {f"{name}.weight" for name in (*family.layer_linear_names(model), *of_vision)}
    tower = {*vision_linears(model, family)}
    in_full = {*vocabulary_tensors(family)} if config.train_embeddings else set()
    in_full |= router_parameters(model).keys() if config.train_router else set()
    chosen = quantizer_from_config(config) if method.quantizer else None
    for name, stored in files.tensors.items():
        is_new = bool(added) and family.locate_layer(name)[0] in added
        quantizer = None
        if files.prequantized:  # the checkpoint's makers chose
            is_packed = name in files.packed and name not in files.dequantized
            quantizer = files.packed[name].quantizer if is_packed else None
        elif chosen and name in linears and not is_new:
            quantizer = chosen
        if quantizer:
            for kind, n_bytes in zip(("codes", "scales"), quantizer.packed_sizes(stored.shape), strict=True):
                shape = (-(-n_bytes // STORAGE.itemsize),)
                planned.append(PlannedParameter(name, kind, shape, STORAGE.itemsize))
        elif family.is_fixed(name):
            planned.append(PlannedParameter(name, "unquantized", stored.shape, itemsize=4, is_sharded=False))
        elif is_new or name in in_full or (trains_all and not family.is_of_vision(name)):
            planned.append(PlannedParameter(name, "trained", stored.shape, precision.trained.itemsize))
        else:
            is_padded = name not in vocabulary_weights(family)
            of_tower = name.rpartition(".")[0] in tower
            itemsize = (precision.matmul_dtype if of_tower else precision.frozen).itemsize
            planned.append(PlannedParameter(name, "unquantized", stored.shape, itemsize, is_padded))
    planned = _stack_experts(planned)
    adapted = [f"{linear}.weight" for linear in adapted_linears(model, family, config)]
    for name in adapted + vision_matrices(family, config):
        rank = config.lora_rank
        rows, columns = files.tensors[name].shape
        shapes = [(rank, columns), (rows, rank), *[(rows,)] * (method.adapter == "dora")]
        planned += [PlannedParameter(name, "trained", shape, precision.trained.itemsize) for shape in shapes]
        if method.adapter == "dora":
            # The squared norms are always fp32.
            planned.append(PlannedParameter(name, "unquantized", (rows,), itemsize=4))
    if config.lora_expert_rank:
        planned += _plan_expert_adapters(config, precision, files)
    return planned


def _plan_expert_adapters(
    config: Config, precision: Precision, files: WeightHeaders
) -> list[PlannedParameter]:
    """Return the parameters of adapters on stacks of experts. Arguments as for `plan_parameters`."""
    members: dict[tuple[str, int], list[str]] = {}
    for name in files.tensors:
        if name.endswith(".weight") and (found := find_stack(name)):
            members.setdefault(found, []).append(name)
    planned, rank, is_dora = [], config.lora_expert_rank, config.method.adapter == "dora"
    for (_, parts), names in members.items():
        (rows, columns), experts = files.tensors[names[0]].shape, len(names) // parts
        shapes: list[tuple[int, ...]] = [(experts, rank, columns), (experts, parts * rows, rank)]
        shapes += [(experts, parts * rows)] * is_dora
        itemsize = precision.trained.itemsize
        planned += [PlannedParameter(names[0], "trained", shape, itemsize) for shape in shapes]
        if is_dora:  # the squared norms are always fp32
            planned.append(PlannedParameter(names[0], "unquantized", shapes[-1], itemsize=4))
    return planned


def _stack_experts(planned: list[PlannedParameter]) -> list[PlannedParameter]:
    """Replace the parameters of single experts by those of their stacks, which have the first one's names."""
    stacks: dict[tuple, list[PlannedParameter]] = {}
    for parameter in planned:
        found = find_stack(parameter.name)
        stacks.setdefault((found, parameter.kind) if found else (parameter,), []).append(parameter)
    stacked = []
    for (found, *_), members in stacks.items():
        first, shape = members[0], members[0].shape
        if not isinstance(found, PlannedParameter):
            parts = found[1]
            packed = first.kind in ("codes", "scales")
            rows = (len(members) * shape[0],) if packed else (len(members) // parts, parts * shape[0])
            first = replace(first, shape=(*rows, *shape[1:]))
        stacked.append(first)
    return stacked


def vocabulary_weights(family: Family) -> tuple[str, str]:
    """Return the tensor names of the embedding and of the head: they have a row for each known token."""
    return f"{family.embedding}.weight", f"{family.head}.weight"


def vocabulary_tensors(family: Family) -> tuple[str, ...]:
    """Return the tensors that --train_embeddings trains: `vocabulary_weights`, and the head's bias if any."""
    return *vocabulary_weights(family), f"{family.head}.bias"


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
        on_experts: those of them that are adapters on routed experts.
        on_gpu, on_host: bytes of this rank.
        n_tensors: parameters of this rank.
    """

    total_weights: WeightBytes
    trained: int
    on_experts: int
    on_gpu: int
    on_host: int
    n_tensors: int

    def describe(self) -> str:
        """Return the line about the weights: the whole model by kind, and this rank's bytes."""
        has_both = torch.cuda.is_available() and self.on_host
        on_host = f", of which {format_bytes(self.on_host)} in host memory" if has_both else ""
        weights, local = self.total_weights, format_bytes(self.on_gpu + self.on_host)
        total = f"{weights} = {format_bytes(weights.total)}"
        experts = f", {self.on_experts:,} of them on experts" if self.on_experts else ""
        return f"model: {self.trained:,} trained parameters{experts}; {total}, {local} on this rank{on_host}"


def expected_memory(
    model: PreTrainedModel,
    family: Family,
    config: Config,
    precision: Precision,
    files: WeightHeaders,
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
    if rank_info.device.type == "cpu":
        on_host = planned
    elif config.use_cpu_offload:
        on_host = [p for p in planned if p.is_sharded]
    else:
        on_host = host_parameters(planned, family, model.config.tie_word_embeddings)
    shards = STRATEGIES[config.sharding_strategy].ranks_per_copy(rank_info.world, config.hybrid_shard_size)
    index = rank_info.rank % shards  # the ranks of a copy are consecutive
    total, host = (sum(p.nbytes(shards, index) for p in group) for group in (planned, on_host))
    trained = [p for p in planned if p.kind == "trained"]
    on_experts = [p for p in trained if config.lora_expert_rank and find_stack(p.name)]
    n_trained, n_experts = (sum(math.prod(p.shape) for p in group) for group in (trained, on_experts))
    return ExpectedMemory(weight_bytes(planned), n_trained, n_experts, total - host, host, len(planned))


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
