"""The model families, and how a model is built on the meta device.

A family is one small file in this folder, and one line in FAMILIES. The forward pass is transformers' own;
nothing of it is patched.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

import models.attention  # noqa: F401 # registers the names that families give their attention
from files.bnb_weights import find_bnb_headers
from files.config_parts import QUANTIZATION_KEYS, text_config
from files.expert_stacks import find_mxfp4_stacks
from files.model_folder import CheckpointFiles
from files.names import CONFIG
from files.quantized_releases import MXFP4, explain_quantization, find_foreign_quantization
from files.weight_headers import WeightHeaders
from files.weight_sets import START_ELEMENTS
from models import (
    cohere,
    cohere2,
    ernie4_5,
    exaone4,
    gemma2,
    gemma3,
    glm4,
    glm4_moe_lite,
    gpt_oss,
    granite,
    helium,
    hunyuan_v1_dense,
    llama,
    ministral3,
    mistral,
    mistral3,
    mixtral,
    nemotron,
    olmo,
    olmo2,
    olmo3,
    phi,
    phi3,
    qwen2,
    qwen2_5_vl,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_vl,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from models.causal_lm import replace_head, summed_loss_class
from models.checkpoint_names import rename_tensors
from models.family import FUSED, Family
from models.redundant import (
    check_extra_tensors,
    check_rotary_frequencies,
    has_untied_head,
    is_tied_by_default,
    rename_tied_head,
)
from models.unsupported import explain_unknown_type, explain_unlisted_type
from models.unused_parts import check_unused_parts
from models.wide_norms import widen_norms
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, MAX_LAYERS, read_json

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3": gemma3.WRAPPER,
    "gemma3_text": gemma3.FAMILY,
    "mistral3": mistral3.FAMILY,
    "phi3": phi3.FAMILY,
    "exaone4": exaone4.FAMILY,
    "granite": granite.FAMILY,
    "ministral3": ministral3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "seed_oss": seed_oss.FAMILY,
    "smollm3": smollm3.FAMILY,
    "starcoder2": starcoder2.FAMILY,
    "glm4": glm4.FAMILY,
    "glm4_moe_lite": glm4_moe_lite.FAMILY,
    "cohere2": cohere2.FAMILY,
    "nemotron": nemotron.FAMILY,
    "phi": phi.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "mixtral": mixtral.FAMILY,
    "helium": helium.FAMILY,
    "hunyuan_v1_dense": hunyuan_v1_dense.FAMILY,
    "ernie4_5": ernie4_5.FAMILY,
    "olmo": olmo.FAMILY,
    "stablelm": stablelm.FAMILY,
    "cohere": cohere.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
}

# Errors of transformers and torch for a config.json with values that no model can have.
CONFIG_ERRORS = (
    StrictDataclassError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)


def read_config(folder: Path, images: bool = False) -> tuple[PretrainedConfig, Family]:
    """Return (a model folder's configuration, its family).

    Raises UserError if config.json is unreadable, its model_type is not in FAMILIES, or the weights are
    quantized, and neither to 4 bits by bitsandbytes nor to MXFP4 in a family that stacks experts. The error
    names all of these that hold. MXFP4 is read as 16 bits, so the result does not say that it is quantized.

    images: whether the model is to take images. Raises UserError if the family has no vision parts.
    """
    raw = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
    kind = find_foreign_quantization(raw, folder)
    try:
        config = _read_known_config(folder, raw)
        family = family_of(config, images)
    except UserError as e:
        raise UserError(f"{e}; besides, {explain_quantization(folder, kind)}") if kind else e from None
    if kind == MXFP4 and family.stacks_experts:
        for key in QUANTIZATION_KEYS:
            vars(config).pop(key, None)
    elif kind:
        raise UserError(f"{folder}/{CONFIG}: {explain_quantization(folder, kind)}")
    return config, family


def _read_known_config(folder: Path, raw: dict) -> PretrainedConfig:
    """Return a model folder's configuration, for weights of any format. raw: the contents of config.json.

    Raises UserError if it is unreadable, or its model_type is not in FAMILIES.
    """
    known = ", ".join(FAMILIES)
    _check_counts(raw, folder)
    if unknown := explain_unknown_type(raw):
        raise UserError(f"{folder}/{CONFIG}: {unknown}; known here: {known}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except CONFIG_ERRORS as e:
        if _lacks_layer_types(raw):
            raise UserError(
                f"{folder}/{CONFIG}: has no layer_types: the kind of each layer, sliding_attention or"
                f" full_attention, in a list; transformers does not derive it from this config ({_reason(e)})"
            ) from None
        # A value of a known architecture was refused, or the architecture is not known.
        architectures = "" if isinstance(e, StrictDataclassError) else f"; known architectures: {known}"
        raise UserError(f"{folder}/{CONFIG}: not readable ({_reason(e)}){architectures}") from None
    if config.model_type not in FAMILIES:
        raise UserError(f"{folder}/{CONFIG}: {explain_unlisted_type(config, list(FAMILIES))}")
    if "text_config" not in raw and "tie_word_embeddings" in raw:  # an old config.json says it once
        text_config(config).tie_word_embeddings = config.tie_word_embeddings
    texts, text = FAMILIES[config.model_type].texts, text_config(config).model_type
    if texts and text not in texts:
        raise UserError(
            f"{folder}/{CONFIG}: text_config has the model_type {text!r}; in {config.model_type} known:"
            f" {', '.join(texts)}"
        )
    return config


def family_of(config: PretrainedConfig, images: bool = False) -> Family:
    """Return the family of a config that `read_config` accepts; in a wrapper, the text model decides too.

    images: whether the model takes images. Raises UserError if the family has no vision parts.
    """
    family = FAMILIES[config.model_type]
    if family.texts:
        family = family.texts[text_config(config).model_type]
    if not images:
        return family
    if family.vision is None:
        with_vision = ", ".join(name for name, known in FAMILIES.items() if known.vision)
        raise UserError(
            f"{config.name_or_path}/{CONFIG}: {config.model_type} takes no images here; these families do:"
            f" {with_vision}"
        )
    return family.with_images()


def _lacks_layer_types(raw: dict) -> bool:
    """Return whether a config.json (`raw`) that is not readable would be so with a list of layer_types."""
    layers = raw.get("num_hidden_layers")
    if raw.get("layer_types") is not None or not isinstance(layers, int):
        return False
    try:
        AutoConfig.for_model(**raw | {"layer_types": ["full_attention"] * layers})
    except CONFIG_ERRORS:
        return False
    return True


def _check_counts(raw: dict, folder: Path) -> None:
    """Raise UserError if config.json (`raw`) has a size below 1, or a num_* value above MAX_LAYERS.

    The parts of a wrapper are checked, too. Each layer is an object, on meta too.
    """
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
            if isinstance(part.get(name), int) and part[name] < 1:
                raise UserError(f"{folder}/{CONFIG}: {name} {part[name]}: must be positive")
        for name, value in part.items():
            if name.startswith("num_") and isinstance(value, int | float) and value > MAX_LAYERS:
                raise UserError(f"{folder}/{CONFIG}: {name} {value}: at most {MAX_LAYERS:,} are built")


def build_on_meta(config: PretrainedConfig, family: Family, attention: str | None = None) -> PreTrainedModel:
    """Return transformers' model of this config on the meta device, in eval mode, with a Head as its head.

    The names and shapes of its parameters are those of the files' tensors. attention: name in transformers'
    registry; None: the family's own.

    Raises UserError if the configuration describes no model, or none that predicts the next token.
    """
    text, vision = text_config(config), family.built_vision()
    config._attn_implementation = attention or family.attention  # of its parts, too
    if vision:  # not causal, and without rows
        getattr(config, vision.config)._attn_implementation = FUSED
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes of zero; check_weights reports them
            model = summed_loss_class(family.model_class, vision)(config)  # type: ignore[arg-type]
            family.match_checkpoint(family.text_model(model))
            for name in family.unbuilt_parts():
                path, _, last = name.rpartition(".")
                setattr(model.get_submodule(path), last, None)
            widen_norms(model, family)
            replace_head(model, family.head, family.logit_scale(text), family.logit_cap(text))
    except CONFIG_ERRORS as e:
        raise UserError(
            f"{config.name_or_path}/{CONFIG}: describes no {config.model_type} model"
            f" ({type(e).__name__}: {_reason(e)})"
        ) from None
    # Embedding models would see the tokens that they must predict, and the padding. transformers reads
    # `is_causal` of modules, and of any model's config when it makes masks.
    if not all(getattr(part, "is_causal", True) for part in (config, text, *model.get_decoder().modules())):
        raise UserError(
            f"{config.name_or_path}/{CONFIG}: describes a model with bidirectional attention"
            " (use_bidirectional_attention or is_causal); only causal models are trained"
        )
    if config.tie_word_embeddings:
        model.get_submodule(family.head).weight = model.get_submodule(family.embedding).weight
    return model.eval()


def _reason(e: Exception) -> str:
    """Return the one line of an exception's message that names the error.

    It is the last line of a validator's message, which begins with a title, and the first line of others.
    """
    lines = str(e).strip().splitlines() or [type(e).__name__]
    return lines[-1 if isinstance(e, StrictDataclassError) else 0].strip()


def open_weights(
    folder: Path, config: PretrainedConfig, family: Family
) -> tuple[CheckpointFiles, PreTrainedModel, str | None]:
    """Return (a folder's tensors, the meta model that they fill, the untied head's tensor name or None).

    If the files hold a head that differs from the embedding, tie_word_embeddings of `config` is set to False
    (models/redundant.py). Raises UserError unless the files hold everything that the model needs, and no
    other tensors than redundant ones.

    Args:
        folder: the model folder.
        config, family: from `read_config`.
    """
    files = CheckpointFiles(folder)
    model = build_on_meta(config, family)
    rename_tensors(model, family, files)
    rename_tied_head(config, family, files)
    untied_head = f"{family.head}.weight" if has_untied_head(config, family, files) else None
    if untied_head:
        config.tie_word_embeddings = False
        model = build_on_meta(config, family)
    files.dequantized = find_packed_routers(model, family, files)
    check_extra_tensors(config, family, files)
    check_weights(model, files, family)
    check_unused_parts(config, family, files)
    return files, model, untied_head


def check_weights(model: PreTrainedModel, files: CheckpointFiles, family: Family) -> None:
    """Remove redundant tensors from `files`; UserError unless the others match the parameters one to one.

    Names and shapes must match. The load streams what is left. Redundant rotary frequencies are read, and
    must be those of the model's config.
    """
    check_shapes(model, files)
    check_rotary_frequencies(model.config, family, files)
    remove_redundant(model, files, family)


def open_headers(
    config: PretrainedConfig, family: Family, headers: WeightHeaders, is_local: bool
) -> PreTrainedModel:
    """Return the meta model that the tensors of `headers` fill; like `open_weights`, by headers.

    Removes redundant tensors from `headers`. If head and embedding differ, tie_word_embeddings of `config` is
    set to False. Raises UserError unless the other tensors are all that the model needs.

    Args:
        config, family: from `read_config`.
        headers: the tensors of the model.
        is_local: whether they can be read. Then the first elements of head and embedding are compared.
    """
    model = build_on_meta(config, family)
    find_mxfp4_stacks(headers.folder, headers.tensors)
    rename_tensors(model, family, headers)
    rename_tied_head(config, family, headers)
    if is_local:
        is_untied = has_untied_head(config, family, headers, START_ELEMENTS)
    else:
        is_untied = is_tied_by_default(config) and f"{family.head}.weight" in headers.tensors
    if is_untied:
        config.tie_word_embeddings = False
        model = build_on_meta(config, family)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    headers.set_packed(find_bnb_headers(headers.folder, headers.tensors, shapes))
    headers.dequantized = find_packed_routers(model, family, headers)
    check_shapes(model, headers)
    remove_redundant(model, headers, family)
    check_unused_parts(config, family, headers)
    return model


def find_packed_routers(model: PreTrainedModel, family: Family, files: WeightHeaders) -> frozenset[str]:
    """Return the names of packed weights of decoder layers that are no linears here: those of routers.

    transformers 4 had linears as routers and as gates of shared experts, and bitsandbytes packed them, too.
    """
    linears = {f"{name}.weight" for name in family.layer_linear_names(model)} if files.packed else set()
    return frozenset(
        name for name in files.packed if name not in linears and family.locate_layer(name)[0] is not None
    )


def check_shapes(model: PreTrainedModel, files: WeightHeaders) -> None:
    """Raise UserError unless `files` hold each parameter, in the model's shape."""
    for name, parameter in model.named_parameters():  # a tied head is listed once
        files.check_shape(name, tuple(parameter.shape))


def remove_redundant(model: PreTrainedModel, files: WeightHeaders, family: Family) -> None:
    """Remove redundant tensors from `files`. Raises UserError for others that belong to no parameter."""
    needed = {name for name, _ in model.named_parameters()}
    tied = model.config.tie_word_embeddings
    for name in list(files.tensors):
        if name in needed:
            continue
        if not family.is_redundant(name, tied):
            raise UserError(
                f"{files.folder}/{files.tensors[name].file}: {files.stored_name(name)} belongs to no"
                " parameter of this model"
            )
        del files.tensors[name]
