"""Why a model_type cannot be trained here, and what can be used instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from options.errors import MAX_NAME_LENGTH

# Beginnings of the names of a config's values, and what only models with such values have.
MARKS = (
    (
        ("mamba_", "ssm_", "state_size", "lru_width", "attention_hidden_size", "qk_dim_factor"),
        "has a state space",
    ),
    (("linear_num_", "linear_attn_", "linear_head_dim", "short_conv_"), "has linear attention"),
    (("conv_L_cache", "cca_"), "has convolutions"),
    (("cross_attention_layers", "cross_attn_"), "has cross-attention"),
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def explain_unknown_type(raw: dict) -> str | None:
    """Return what is said of a config.json (`raw`) whose model_type the installed transformers does not know.

    So are the types of a wrapper's parts. None: it knows all types, or config.json has none.
    """
    installed = transformers.__version__
    unknown = next(((part, name) for part, name in _model_types(raw) if name not in CONFIG_MAPPING), None)
    if unknown is None:
        return None
    part, name = unknown
    found = (
        f"{part}model_type {name[:MAX_NAME_LENGTH]!r} is unknown to the installed transformers {installed}"
    )
    if raw.get("auto_map"):
        return f"{found}: it is code of the model's own repository (auto_map), which is never run here"
    saved = _release(raw.get("transformers_version"))
    if not saved:
        return f"{found}; config.json does not name the version that wrote it"
    version = ".".join(map(str, saved))
    if saved > _release(installed):
        return f"{found}; {version} wrote the file and knows it: pip install 'transformers>={version}'"
    return f"{found}, though {version} wrote the file"


def _model_types(raw: dict) -> Iterator[tuple[str, str]]:
    """Yield (where, model_type) of a config.json, and of its parts whose class the type decides."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        return
    yield "", model_type
    parts = CONFIG_MAPPING[model_type].sub_configs if model_type in CONFIG_MAPPING else {}
    for part in (name for name, config_class in parts.items() if config_class is AutoConfig):
        of_part = raw[part].get("model_type") if isinstance(raw.get(part), dict) else None
        if isinstance(of_part, str):
            yield f"{part}: ", of_part


def _release(version: Any) -> tuple[int, ...]:
    """Return the numbers of a version, (5, 24, 0) of "5.24.0.dev0"; () if it is none."""
    found = re.match(r"\d{1,4}(\.\d{1,4}){1,2}", version) if isinstance(version, str) else None
    return tuple(map(int, found[0].split("."))) if found else ()


def explain_unlisted_type(config: PretrainedConfig, known: list[str]) -> str:
    """Return what is said of a config whose model_type transformers knows, and `known` does not list.

    It names what the program lacks, and the nearest family that it has; for a plain decoder, the tool that
    shows what the family would need.
    """
    model_type = config.model_type
    lacking = find_lacking_part(config)
    if lacking is None:
        return (
            f"model_type {model_type!r} is unknown; known: {', '.join(known)};"
            f" `python -m tools.try_family {model_type}` shows whether it can be added"
        )
    nearest = nearest_family(config, known)
    return (
        f"model_type {model_type!r} {lacking}; only causal decoders of attention and MLPs are trained here:"
        f" the nearest is {nearest}; known: {', '.join(known)}"
    )


def find_lacking_part(config: PretrainedConfig) -> str | None:
    """Return what makes a model of this config another kind than all families here; None if nothing does."""
    if config.is_encoder_decoder:
        return "has an encoder"
    text = config.get_text_config()
    names = text.to_dict().keys() | config.to_dict().keys()
    for beginnings, part in MARKS:
        if any(name.startswith(beginnings) for name in names):
            return part
    if "linear_attention" in str(
        [getattr(text, name, None) for name in ("layer_types", "layers_block_type")]
    ):
        return "has linear attention"
    if getattr(text, "add_cross_attention", False):
        return "has cross-attention"
    if text is not config:
        return None if _has_causal_class(text.model_type) else "has inputs other than text"
    if not _has_causal_class(config.model_type) or _is_switched_to_encoder(config):
        return "is no causal decoder"
    return None


def _has_causal_class(model_type: str) -> bool:
    """Return whether transformers has a causal decoder of this type. It lists Mistral 4's as a wrapper."""
    of_wrappers = str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type))
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or of_wrappers.endswith("ForCausalLM")


def _is_switched_to_encoder(config: PretrainedConfig) -> bool:
    """Return whether the class can be an encoder or a decoder, and the config says that it is an encoder."""
    return hasattr(config, "add_cross_attention") and getattr(config, "is_decoder", None) is False


def nearest_family(config: PretrainedConfig, known: list[str]) -> str:
    """Return the known family whose name begins most like the config's model_type, llama if none does.

    All letters before a digit or an underline of one of both names must be equal. Among equals it is one with
    routed experts if the config has them, and the last of these.
    """
    has_experts = any(getattr(config.get_text_config(), name, None) for name in EXPERTS)

    def likeness(name: str) -> tuple[int, bool, bool, int]:
        shared = _common_length(name, config.model_type)
        return shared, name == config.model_type, name.endswith("_moe") == has_experts, known.index(name)

    best = max(known, key=likeness)
    is_like = likeness(best)[0] >= max(3, min(map(_count_letters, (best, config.model_type))))
    return best if is_like else "llama"


def _count_letters(name: str) -> int:
    """Return the number of letters with which the name begins."""
    return len(re.match("[a-z]*", name)[0])  # type: ignore[index] # it matches any text


def _common_length(a: str, b: str) -> int:
    """Return the number of characters with which both texts begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
