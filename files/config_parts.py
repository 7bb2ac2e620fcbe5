"""Which part of a model's config says what.

A wrapper's config (Gemma 3 with pictures, Mistral Small 3) holds one config for each of its parts. Sizes,
token ids and RoPE are read from `text_config`, which of a plain decoder is the whole config.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig

# Keys that describe packed weights. The second is of older releases in compressed-tensors.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def text_config(config: PretrainedConfig) -> Any:
    """Return the config of the text model: a wrapper's `text_config`, or `config` itself.

    The wrapper's own config says whether the head is tied (tie_word_embeddings), in transformers too.
    transformers' get_text_config is not used: any config.json with a text_config, a decoder or a generator is
    a wrapper to it.
    """
    return config.text_config if "text_config" in config.sub_configs else config


def router_loss_factor(config: PretrainedConfig) -> float | None:
    """Return the factor of the routers' auxiliary loss, if the config asks for it (models/router_loss.py)."""
    text = text_config(config)
    is_known = hasattr(type(text), "router_aux_loss_coef")  # in other models the keys have no effect
    return text.router_aux_loss_coef if is_known and text.output_router_logits else None


def eos_token_id(config: PretrainedConfig) -> int | list[int] | None:
    """Return eos_token_id of a config. A wrapper's own comes before that of its text_config."""
    own = getattr(config, "eos_token_id", None)
    return own if own is not None else text_config(config).eos_token_id


def weights_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """Return the dtype that a config or its text_config gives the files' weights, or None."""
    dtypes = (getattr(part, "dtype", None) for part in (config, text_config(config)))
    return next((dtype for dtype in dtypes if isinstance(dtype, torch.dtype)), None)


def find_quantization(config: PretrainedConfig | dict) -> Any:
    """Return what a config, or the contents of config.json, says about packed weights; None if nothing.

    transformers looks for it in the whole config, and then in text_config. It is a dict in valid files.
    """
    found = (part.get(key) for part in _whole_and_text(config) for key in QUANTIZATION_KEYS)
    return next((value for value in found if value), None)


def without_quantization(raw: dict) -> dict:
    """Return the contents of config.json, `raw`, without what `find_quantization` finds in them."""
    plain = {key: value for key, value in raw.items() if key not in QUANTIZATION_KEYS}
    if isinstance(raw.get("text_config"), dict):
        plain["text_config"] = {k: v for k, v in raw["text_config"].items() if k not in QUANTIZATION_KEYS}
    return plain


def _whole_and_text(config: PretrainedConfig | dict) -> Iterator[dict]:
    """Yield the values of a config, and those of its text_config if it has one."""
    whole = config if isinstance(config, dict) else vars(config)
    yield whole
    text = whole.get("text_config")
    if isinstance(text, dict | PretrainedConfig):
        yield text if isinstance(text, dict) else vars(text)
