"""Model families: how each is built on the meta device, and what its parts are called.

A family is one small file beside this one, and one line in FAMILIES. The forward pass is transformers'
own; nothing of it is patched.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from files.model_folder import CheckpointFiles
from files.names import CONFIG
from models import gemma2, gemma3, llama, mistral, phi3, qwen2, qwen3, qwen3_moe
from models.causal_lm import put_head, with_summed_loss
from models.family import Family
from models.redundant import check_extras, check_frequencies, has_own_head, name_embedding
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, MAX_LAYERS, read_json

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "phi3": phi3.FAMILY,
}

# What transformers and torch raise for a config.json with values that no model can have.
UNUSABLE = (
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


def read_config(folder: Path) -> tuple[PretrainedConfig, Family]:
    """(the model's configuration, its family). Raises UserError for an unknown architecture."""
    known = ", ".join(FAMILIES)
    if (folder / CONFIG).is_file():
        _check_counts(read_json(folder / CONFIG, MAX_CONFIG_BYTES), folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except UNUSABLE as e:
        raise UserError(
            f"{folder}/{CONFIG}: not readable ({_reason(e)}); known architectures: {known}"
        ) from None
    if config.model_type not in FAMILIES:
        raise UserError(f"{folder}/{CONFIG}: model_type {config.model_type!r} is unknown; known: {known}")
    return config, FAMILIES[config.model_type]


def _check_counts(raw: dict, folder: Path) -> None:
    """Raises UserError for numbers that no model has. Each layer is an object, also on the meta device."""
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        if isinstance(raw.get(name), int) and raw[name] < 1:
            raise UserError(f"{folder}/{CONFIG}: {name} {raw[name]}: must be positive")
    for name, value in raw.items():
        if name.startswith("num_") and isinstance(value, int | float) and value > MAX_LAYERS:
            raise UserError(f"{folder}/{CONFIG}: {name} {value}: at most {MAX_LAYERS:,} are built")


def build_on_meta(config: PretrainedConfig, family: Family, attention: str | None = None) -> PreTrainedModel:
    """transformers' model of this family with every tensor on the meta device: shapes, no memory. Its parameters
    are the files' tensors. attention: by transformers' name, instead of the family's own.

    Raises UserError if the configuration describes no model, or none that predicts the next token.
    """
    config._attn_implementation = attention or family.attention
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are zero; check_weights says it
            model = with_summed_loss(family.model_class)(config)  # type: ignore[arg-type]
            family.as_stored(model)
            put_head(model, family.head, family.logit_scale(config), family.logit_cap(config))
    except UNUSABLE as e:
        raise UserError(
            f"{config.name_or_path}/{CONFIG}: describes no {config.model_type} model"
            f" ({type(e).__name__}: {_reason(e)})"
        ) from None
    # Embedding models: they would see the tokens that they are to predict, and the padding. transformers asks
    # the modules, and when it makes masks the config: `is_causal` of any model.
    if not all(getattr(part, "is_causal", True) for part in (config, *model.modules())):
        raise UserError(
            f"{config.name_or_path}/{CONFIG}: describes a model with bidirectional attention"
            " (use_bidirectional_attention or is_causal); only causal models are trained"
        )
    if config.tie_word_embeddings:
        model.get_submodule(family.head).weight = model.get_submodule(family.embedding).weight
    return model.eval()


def _reason(e: Exception) -> str:
    """The line of transformers' message that says what is wrong: the first, below a validator's title."""
    lines = str(e).strip().splitlines() or [type(e).__name__]
    return lines[-1 if isinstance(e, StrictDataclassError) else 0].strip()


def open_weights(
    folder: Path, config: PretrainedConfig, family: Family
) -> tuple[CheckpointFiles, PreTrainedModel, str | None]:
    """(the tensors of a model folder, the model on meta that they fill, the tensor of its head if that was
    untied). Where the files hold a head that differs from the embedding, `config`, which `read_config` gave,
    is set to have no tied one (models/redundant.py). Raises UserError unless the files hold what the model
    needs, and nothing else that differs from what it computes with."""
    files = CheckpointFiles(folder)
    name_embedding(config, family, files)
    own_head = f"{family.head}.weight" if has_own_head(config, family, files) else None
    if own_head:
        config.tie_word_embeddings = False
    model = build_on_meta(config, family)
    check_extras(config, family, files)
    check_weights(model, files, family)
    return files, model, own_head


def check_weights(model: PreTrainedModel, files: CheckpointFiles, family: Family) -> None:
    """Every parameter has one tensor of its shape, and every tensor a parameter. Raises UserError.

    Drops from `files` the tensors that nothing needs, so that what is left is what will be streamed.
    """
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head is listed once
    for name, shape in wanted.items():
        if name not in files.tensors:
            raise UserError(f"{files.folder}: tensor {name} is missing from the weights")
        stored = files.tensors[name]
        if stored.shape != shape:
            raise UserError(
                f"{files.folder}/{stored.file}: {name} has shape {list(stored.shape)},"
                f" but config.json says {list(shape)}"
            )
    check_frequencies(model.config, family, files)
    tied = model.config.tie_word_embeddings
    for name in list(files.tensors):
        if name not in wanted and not family.ignores(name, tied):
            raise UserError(f"{files.folder}/{files.tensors[name].file}: {name} has no place in this model")
        if name not in wanted:
            del files.tensors[name]
