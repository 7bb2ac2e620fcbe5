"""The sizes of a run (sizes.py) from its options and the shapes of its model; no weight is loaded.

Shapes: T tokens of the longest sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedModel

from files.config_parts import text_config
from files.weight_headers import WeightHeaders
from launch.precision import Precision
from models.adapters import target_linears
from models.family import Family
from models.vision_parts import vision_targets
from monitoring.layer_memory import layer_widths
from monitoring.sizes import RunSizes, round_up_to_power
from monitoring.vision_memory import VisionSizes
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
    pixels: int = 0,
) -> RunSizes:
    """Return the sizes that determine the memory of a run with the options `config`; loads no weights.

    Args:
        model: from build_on_meta, before a method changes it; not changed, so one serves for many options.
        family: the model's family.
        config: the run's options, as for `plan_parameters`.
        precision: dtypes of frozen and trained weights.
        files: shapes of the weights, and which of them are packed already.
        tokens: T, tokens of the longest sequence: a row or, with --packing, a pack.
        pixels: of the resized images of the sequence that has most of them (data/fullest_images.py).
    """
    planned = plan_parameters(model, family, config, precision, files)
    vocabulary = [p for p in planned if p.name in vocabulary_weights(family)]
    units, trained_units = Counter[tuple](), Counter[tuple]()
    for parameter in planned:
        if (unit := _unit_of(parameter.name, family, config)) is not None:
            units[unit] += parameter.nbytes()
            trained_units[unit] += parameter.nbytes() * (parameter.kind == "trained")
    trained_layers = [layer for (layer, _), n_bytes in trained_units.items() if n_bytes and layer is not None]
    vision = _vision_sizes(model, family, config, planned)
    # Through the embeddings of images, backward goes on to the vision parts.
    reaches_all = _trains_embedding(vocabulary) or bool(vision and vision.is_trained)
    layers = len(family.decoder_layers(model))
    on_host = host_parameters(planned, family, model.config.tie_word_embeddings)
    adapted = target_linears(model, family, config.lora_target_modules) if config.method.adapter else []
    per_layer = Counter(family.locate_layer(name)[0] for name in adapted)
    whole = [p for p in planned if p.kind != "codes" and p.shape == tuple(files.tensors[p.name].shape)]
    largest = max(whole, key=PlannedParameter.nbytes)
    return RunSizes(
        tokens=tokens,
        vocabulary=text_config(model.config).vocab_size,
        layers=layers,
        saved_layers=layers - (0 if reaches_all else min(trained_layers, default=0)),
        widths=layer_widths(model, family),
        branches=max(per_layer.values(), default=0),
        weights=weight_bytes(planned),
        unit=max(units.values()),
        trained_unit=max(trained_units.values()),
        trains_layers=not config.method.adapter,
        vocabulary_bytes=max(p.nbytes() * (p.kind == "trained") for p in vocabulary),
        tied=_tied_bytes(model, family, planned),
        on_host=sum(p.nbytes() for p in on_host),
        page_locked=_page_locked_bytes(planned if config.use_cpu_offload else on_host, config),
        largest_tensor=largest.nbytes(),
        largest_in_file=files.tensors[largest.name].nbytes,
        largest_read=_largest_read(planned, family, files),
        vision=vision,
        pixels=pixels,
    )


def _unit_of(name: str, family: Family, config: Config) -> tuple[int | None, str] | None:
    """Return (layer, part) of the FSDP unit of a tensor; the layer is None in the vision parts.

    The result is None for the units of embedding, head and last norm.
    """
    vision = family.built_vision()
    if vision and family.is_of_vision(name):
        return None, vision.unit_of(name)
    layer, below = family.locate_layer(name)
    if layer is None:
        return None
    return layer, _sublayer(below, family) if config.wrap_policy == "sublayer" else ""


def _vision_sizes(
    model: PreTrainedModel, family: Family, config: Config, planned: Iterable[PlannedParameter]
) -> VisionSizes | None:
    """Return the sizes of a model's tower; None if the model is built without vision parts.

    Args:
        model: from build_on_meta, before a method changes it.
        family: the model's family.
        config: the run's options.
        planned: the parameters of the model.
    """
    vision = family.built_vision()
    if vision is None:
        return None
    tower = getattr(model.config, vision.config)
    own = [p for p in planned if family.is_of_vision(p.name)]
    targets = vision_targets(model, family, config) if config.method.adapter else []
    of_blocks = Counter(vision.unit_of(name) for name in targets if name.startswith(f"{vision.blocks}."))
    mergers = {name.rpartition(".")[0] for name in targets if not name.startswith(f"{vision.blocks}.")}
    return VisionSizes(
        hidden=tower.hidden_size,
        mlp=tower.intermediate_size,
        heads=getattr(tower, "num_attention_heads", None) or tower.num_heads,
        blocks=len(vision.tower_blocks(model)),
        patch=tower.patch_size,
        frames=getattr(tower, "temporal_patch_size", 1),
        merge=getattr(tower, "spatial_merge_size", 1),
        output=text_config(model.config).hidden_size,
        feature_layers=vision.feature_layers(model.config),
        block=vision.block,
        weights=sum(p.nbytes() for p in own),
        is_packed=any(p.kind == "codes" for p in own),
        branches=max(of_blocks.values(), default=0),
        mergers=len(mergers),
        is_trained=any(p.kind == "trained" for p in own),
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


def _tied_bytes(model: PreTrainedModel, family: Family, planned: Iterable[PlannedParameter]) -> int:
    """Return the bytes of the embedding if it is the head, too, else 0."""
    if not model.config.tie_word_embeddings:
        return 0
    return next(p.nbytes() for p in planned if p.name == f"{family.embedding}.weight")


def _largest_read(planned: Iterable[PlannedParameter], family: Family, files: WeightHeaders) -> int:
    """Return the bytes of the largest weight that the load has read, embedding and head aside."""
    packed = Counter[str]()
    for parameter in planned:
        if parameter.kind in ("codes", "scales"):
            packed[parameter.name] += parameter.nbytes()
    others = files.tensors.keys() - vocabulary_weights(family)
    return max(packed[name] or files.tensors[name].nbytes for name in others)


def _trains_embedding(vocabulary: list[PlannedParameter]) -> bool:
    return any(p.kind == "trained" for p in vocabulary)
