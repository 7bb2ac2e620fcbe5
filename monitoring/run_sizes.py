"""The sizes of a run (sizes.py) from its options and the shapes of its model; no weight is loaded.

Shapes: T tokens of the longest sequence.
"""

from __future__ import annotations

import math
from collections import Counter

from transformers import PreTrainedModel

from files.config_parts import text_config
from files.tensors import StoredTensor
from files.weight_headers import WeightHeaders
from launch.precision import Precision
from models.adapters import target_linears
from models.family import Family
from monitoring.layer_memory import layer_widths
from monitoring.sizes import RunSizes, round_up_to_power
from monitoring.weight_memory import (
    PlannedParameter,
    host_parameters,
    plan_parameters,
    vocabulary_weights,
    weight_bytes,
)
from options.config import Config
from options.strategies import shards_of

# Tensors of a trained weight that --use_cpu_offload may page-lock: itself, its gradient, and a checkpoint's
# copies of it and of Adam's two moments. wrapping.py tries them all at start, so that they count even without
# checkpoints; later the moments themselves, which are not page-locked, take their place.
LOCKED_COPIES = 5


def run_sizes(
    model: PreTrainedModel,
    family: Family,
    config: Config,
    precision: Precision,
    files: WeightHeaders,
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
    planned = plan_parameters(model, family, config, precision, files)
    vocabulary = [p for p in planned if p.name in vocabulary_weights(family)]
    in_layers = [(place, p) for p in planned if (place := family.locate_layer(p.name))[0] is not None]
    units, trained_units = Counter[tuple](), Counter[tuple]()
    for (layer, name), parameter in in_layers:
        unit = layer, _sublayer(name, family) if config.wrap_policy == "sublayer" else ""
        units[unit] += parameter.nbytes()
        trained_units[unit] += parameter.nbytes() * (parameter.kind == "trained")
    trained_layers = [layer for (layer, _), n_bytes in trained_units.items() if n_bytes]
    layers = len(family.decoder_layers(model))
    on_host = host_parameters(planned, family, model.config.tie_word_embeddings)
    adapted = target_linears(model, family, config.lora_target_modules) if config.method.adapter else []
    per_layer = Counter(family.locate_layer(name)[0] for name in adapted)
    is_tied = model.config.tie_word_embeddings
    whole = [p for p in planned if p.kind != "codes" and p.shape == tuple(files.tensors[p.name].shape)]
    largest = max(whole, key=PlannedParameter.nbytes)
    return RunSizes(
        tokens=tokens,
        vocabulary=text_config(model.config).vocab_size,
        layers=layers,
        saved_layers=layers - (0 if _trains_embedding(vocabulary) else min(trained_layers, default=0)),
        widths=layer_widths(model, family),
        branches=max(per_layer.values(), default=0),
        weights=weight_bytes(planned),
        unit=max(units.values()),
        trained_unit=max(trained_units.values()),
        trains_layers=not config.method.adapter,
        vocabulary_bytes=max(p.nbytes() * (p.kind == "trained") for p in vocabulary),
        is_tied=is_tied,
        on_host=sum(p.nbytes() for p in on_host),
        page_locked=_page_locked_bytes(planned if config.use_cpu_offload else on_host, config),
        largest_tensor=largest.nbytes(),
        largest_in_file=math.prod(largest.shape) * _itemsize(files.tensors[largest.name]),
    )


def _page_locked_bytes(planned: list[PlannedParameter], config: Config) -> int:
    """Return the bytes that a rank page-locks for these parameters."""
    shards = shards_of(config)
    copies = LOCKED_COPIES if config.use_cpu_offload else 1
    sizes = [(p.nbytes(shards), copies if p.kind == "trained" else 1) for p in planned]
    return sum(number * round_up_to_power(size) for size, number in sizes)


def _sublayer(name: str, family: Family) -> str:
    """Return the sublayer that a tensor of a layer belongs to; "" for the rest of the layer."""
    return next((part for part in family.sublayers if name.startswith(f"{part}.")), "")


def _itemsize(stored: StoredTensor) -> int:
    """Return the bytes of an element in the file."""
    return stored.torch_dtype.itemsize


def _trains_embedding(vocabulary: list[PlannedParameter]) -> bool:
    return any(p.kind == "trained" for p in vocabulary)
