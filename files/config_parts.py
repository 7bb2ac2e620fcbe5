"""Which part of a model's config says what.

A wrapper's config (Gemma 3 with pictures, Mistral Small 3) holds one config for each of its parts. Sizes,
token ids and RoPE are read from `text_config`, which of a plain decoder is the whole config.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig


def text_config(config: PretrainedConfig) -> Any:
    """Return the config of the text model: a wrapper's `text_config`, or `config` itself.

    The wrapper's own config says whether the head is tied (tie_word_embeddings), in transformers too, and how
    the weights are quantized. transformers' get_text_config is not used: any config.json with a text_config,
    a decoder or a generator is a wrapper to it.
    """
    return config.text_config if "text_config" in config.sub_configs else config


def eos_token_id(config: PretrainedConfig) -> int | list[int] | None:
    """Return eos_token_id of a config. A wrapper's own comes before that of its text_config."""
    own = getattr(config, "eos_token_id", None)
    return own if own is not None else text_config(config).eos_token_id


def weights_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """Return the dtype that a config or its text_config gives the files' weights, or None."""
    dtypes = (getattr(part, "dtype", None) for part in (config, text_config(config)))
    return next((dtype for dtype in dtypes if isinstance(dtype, torch.dtype)), None)
