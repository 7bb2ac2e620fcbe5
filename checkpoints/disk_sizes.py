"""The bytes that a run writes to disks, by the shapes of its weights and the options: for plans.

They are those of safetensors' headers and tensors and of the JSON beside them. Small files are left out:
metrics, report, samples, and the tokenizer of a result whose base is not on this disk.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from io import BytesIO

import torch
from transformers import PreTrainedModel

from checkpoints.model_writer import list_small_files
from checkpoints.storage import rank_file_name
from files.saved_adapter import PEFT_PREFIX
from files.tensors import StoredTensor, write_header
from files.weight_headers import WeightHeaders
from launch.precision import Precision
from models.adapters import packed_linears, quantizer_from_config
from models.family import Family
from models.llama_pro import new_layers
from models.moe import find_stack
from monitoring.weight_memory import PlannedParameter, plan_parameters, vocabulary_tensors
from options.config import Config
from options.strategies import shards_of
from parallel.optimizers import BLOCK_SIZE, MIN_8BIT_ELEMENTS

# Optimizers' states that are as large as the parameter; others have AdamW's two.
STATES: dict[str, tuple[str, ...]] = {"sgd": (), "adadelta": ("square_avg", "acc_delta")}
ADAM_STATES = ("exp_avg", "exp_avg_sq")
STATELESS, PAGED, EIGHT_BIT = ("sgd",), ("paged_adamw_32bit",), ("adamw_8bit", "paged_adamw_8bit")
RUN_STATE_BYTES = 3000  # of a manifest: options, digests, the state of schedule and data
RANDOM_STATE_BYTES = 5056  # of a rank's generator on the CPU; a GPU's has 16


class _Tensors:
    """Tensors of a safetensors file, to add up its bytes. tensors: {name: description}."""

    def __init__(self) -> None:
        self.tensors: dict[str, StoredTensor] = {}

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.tensors[name] = StoredTensor("", shape, dtype)

    def data_bytes(self) -> int:
        return sum(math.prod(t.shape) * t.torch_dtype.itemsize for t in self.tensors.values())

    def header_bytes(self) -> int:
        """Return the bytes of the header of a file that holds all of them."""
        header = BytesIO()
        write_header(header, self.tensors)  # type: ignore[arg-type] # whose dtypes are torch's here
        return len(header.getvalue())


@dataclass(frozen=True)
class DiskSizes:
    """Bytes on disks.

    Attributes:
        cache: of --quantized_cache; 0 without.
        checkpoint: one checkpoint.
        checkpoints: most that checkpoints take at a time, with the one that is being written; 0 if the
            options ask for none (a signal still makes one); None if all are kept, and their number is not
            known.
        best: of best/, while a new one replaces the old one; 0 without.
        result: in the output folder at the end; 0 without.
    """

    cache: int
    checkpoint: int
    checkpoints: int | None
    best: int
    result: int

    @property
    def total(self) -> int:
        """Bytes of all together. If the number of checkpoints is not known, one is counted."""
        kept = self.checkpoint if self.checkpoints is None else self.checkpoints
        return self.cache + kept + self.best + self.result


def disk_sizes(
    model: PreTrainedModel,
    family: Family,
    config: Config,
    precision: Precision,
    files: WeightHeaders,
    steps: int | None = None,
) -> DiskSizes:
    """Return the bytes that a run with these options writes.

    Args:
        model: from build_on_meta, before a method changes it; not changed.
        family: the model's family.
        config: the run's options, resolved, with its world_size.
        precision: dtypes of the run.
        files: shapes and dtypes of the weights, and which of them are packed already.
        steps: optimizer steps of the run; None: not known, unless --max_steps says it.
    """
    trained = [p for p in plan_parameters(model, family, config, precision, files) if p.kind == "trained"]
    checkpoint = _checkpoint_bytes(config, precision, trained)
    steps = config.max_steps if steps is None and config.max_steps > 0 else steps
    kept = _count_checkpoints(config, steps)
    blocks = config.llama_pro_save == "blocks"
    result = _result_bytes(model, family, config, precision, files, trained, blocks=blocks)
    best = _result_bytes(model, family, config, precision, files, trained, blocks=True)
    return DiskSizes(
        cache=_cache_bytes(model, family, config, files) if config.quantized_cache else 0,
        checkpoint=checkpoint,
        checkpoints=None if kept is None else kept * checkpoint,
        best=2 * best * config.saves_best,
        result=result * config.save_model,
    )


def _count_checkpoints(config: Config, steps: int | None) -> int | None:
    """Return how many checkpoints there are at most at a time; None: not known.

    An old checkpoint is removed when the next is complete.
    """
    if not config.save_every and not config.save_minutes:
        return 0
    made = None
    if steps is not None and not config.save_minutes:
        made = -(-steps // config.save_every)  # the last step has one
    if config.keep < 0:
        return made
    return config.keep + 1 if made is None else min(config.keep + 1, made)


def _checkpoint_bytes(config: Config, precision: Precision, trained: list[PlannedParameter]) -> int:
    """Return the bytes of a checkpoint: trained weights, the optimizer's states, random states, manifest."""
    world = config.world_size
    shards = shards_of(config)
    sharded = _Tensors()
    for i, parameter in enumerate(trained):
        name = f"{parameter.name}.{i}"  # about as long as in a checkpoint
        sharded.add(f"model.{name}", parameter.shape, precision.trained)
        if config.optimizer not in EIGHT_BIT:
            # bitsandbytes' 32 bits are fp32 for parameters of any dtype.
            dtype = torch.float32 if config.optimizer in PAGED else precision.trained
            for state in STATES.get(config.optimizer, ADAM_STATES):
                sharded.add(f"optimizer.{state}.{name}", parameter.shape, dtype)
        if config.optimizer not in STATELESS:
            sharded.add(f"optimizer.step.{name}", (), torch.float32)
    total = RUN_STATE_BYTES + sharded.data_bytes() + shards * sharded.header_bytes()
    total += _manifest_bytes(sharded, shards)
    for first, number in _alike_ranks(trained, world, shards):
        own = _own_tensors(config.optimizer, trained, shards, first)
        total += number * (own.data_bytes() + own.header_bytes() + _manifest_bytes(own, 1))
    return total


def _own_tensors(optimizer: str, trained: list[PlannedParameter], shards: int, rank: int) -> _Tensors:
    """Return the tensors of a checkpoint that a rank has for itself."""
    own = _Tensors()
    own.add(f"random.cpu@{rank}", (RANDOM_STATE_BYTES,), torch.uint8)
    for i, parameter in enumerate(trained if optimizer in EIGHT_BIT else ()):
        elements = _local_elements(parameter, shards, rank)
        _add_8bit_states(own, f"@{rank}.{parameter.name}.{i}", elements)
    return own


def _alike_ranks(trained: list[PlannedParameter], world: int, shards: int) -> list[tuple[int, int]]:
    """Return (first, number) of consecutive ranks whose shards have the same numbers of elements.

    A shard is whole in the first ranks, smaller in the next one, and empty in the last ones.
    """
    edges = {0, world}
    for rows in {parameter.shape[0] for parameter in trained}:
        whole = rows // -(-rows // shards)
        edges |= {first + end for first in range(0, world, shards) for end in (0, whole, whole + 1)}
    if shards == 1:  # all have everything
        edges = {0, world}
    starts = sorted(edge for edge in edges if edge <= world)
    return [(start, end - start) for start, end in itertools.pairwise(starts)]


def _local_elements(parameter: PlannedParameter, shards: int, rank: int) -> int:
    """Return the number of elements of a rank's shard, without padding."""
    exact = dataclasses.replace(parameter, itemsize=1, is_padded=False)
    return exact.nbytes(shards, rank % shards)


def _manifest_bytes(tensors: _Tensors, chunks: int) -> int:
    """Return the bytes of a manifest's entries of these tensors, each in so many chunks."""
    total = 0
    for name, tensor in tensors.tensors.items():
        entry = {"dtype": str(tensor.dtype), "shape": tensor.shape, "chunks": []}
        chunk = [[0] * len(tensor.shape), tensor.shape, rank_file_name(0)]
        total += len(json.dumps({name: entry})) + chunks * len(json.dumps(chunk))
    return total


def _add_8bit_states(tensors: _Tensors, suffix: str, elements: int) -> None:
    """Add the states that bitsandbytes' 8-bit AdamW has for a shard; none for a shard without elements."""
    for key in "12" if elements else "":
        is_8bit = elements >= MIN_8BIT_ELEMENTS
        dtype = torch.uint8 if is_8bit else torch.float32
        tensors.add(f"optimizer.state{key}{suffix}", (elements,), dtype)
        if is_8bit:
            tensors.add(f"optimizer.absmax{key}{suffix}", (-(-elements // BLOCK_SIZE),), torch.float32)
            tensors.add(f"optimizer.qmap{key}{suffix}", (256,), torch.float32)


def _cache_bytes(model: PreTrainedModel, family: Family, config: Config, files: WeightHeaders) -> int:
    """Return the bytes of a --quantized_cache."""
    quantizer, packed = quantizer_from_config(config), _Tensors()
    names = [f"{name}.weight" for name in packed_linears(model, family, config, files)]
    for name in names:
        for kind, n in zip(
            ("codes", "scales"), quantizer.packed_sizes(files.tensors[name].shape), strict=True
        ):
            packed.add(f"{name}.{kind}", (n,), torch.uint8)
    entry = {"file": "packed-0-0.safetensors", "crc": 2**31}
    manifest = json.dumps({"tensors": dict.fromkeys(names, entry)}, indent=1)
    return packed.data_bytes() + packed.header_bytes() + len(manifest)


def _result_bytes(
    model: PreTrainedModel,
    family: Family,
    config: Config,
    precision: Precision,
    files: WeightHeaders,
    trained: list[PlannedParameter],
    *,
    blocks: bool,
) -> int:
    """Return the bytes of a result: an adapter, new blocks, or a model folder.

    Args:
        model, family, config, precision, files: as for `disk_sizes`.
        trained: the trained parameters.
        blocks: whether of an expanded model only the new blocks are saved.
    """
    saved = _Tensors()
    if config.method.saves == "adapter":
        vocabulary = vocabulary_tensors(family)
        for i, p in enumerate(trained):
            if p.name not in vocabulary:
                # A DoRA's magnitude is saved in fp32. On experts it has two dimensions, A and B three.
                vector_dims = 2 if find_stack(p.name) else 1
                dtype = precision.trained if len(p.shape) > vector_dims else torch.float32
                saved.add(f"{PEFT_PREFIX}{p.name}.lora_A{i}", p.shape, dtype)
        embedding, head, _ = vocabulary
        shapes = {name: files.tensors[name].shape for name in vocabulary if name in files.tensors}
        shapes[head] = shapes[embedding]  # saved twice if they are tied
        for name, shape in shapes.items() if config.train_embeddings else ():
            saved.add(f"{PEFT_PREFIX}{name}", shape, precision.trained)
        return saved.data_bytes() + saved.header_bytes()
    new = new_layers(model.config) if config.method.expansion else []
    written = [name for name in files.tensors if not (blocks and new) or family.locate_layer(name)[0] in new]
    for name, (shape, dtype) in files.written_shapes(written).items():
        saved.add(name, shape, dtype)
    if blocks and new:
        return saved.data_bytes() + saved.header_bytes()
    for name, stored in files.apart.tensors.items() if files.apart else ():
        saved.add(name, stored.shape, stored.torch_dtype)
    index = len(
        json.dumps({"weight_map": dict.fromkeys(saved.tensors, "model-00001-of-00001.safetensors")}, indent=2)
    )
    small = list_small_files(files.folder) if files.folder.is_dir() else []
    return saved.data_bytes() + saved.header_bytes() + index + sum(path.stat().st_size for path in small)
