"""Which tokens end an answer: one computation for training's samples, evaluate.py, generate.py and what a run
saves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from data.formats import RenderContext
from files.names import CONFIG, GENERATION_CONFIG
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, read_json


def base_stops(folder: Path, config_eos: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer of the model in `folder`: its tokenizer's EOS, and those of
    generation_config.json and of config.json (config_eos: `eos_token_id` there). Raises UserError for what is
    no id."""
    stops = set(_ids(config_eos, folder / CONFIG))
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    path = folder / GENERATION_CONFIG
    if path.is_file():
        stops.update(_ids(read_json(path, MAX_CONFIG_BYTES).get("eos_token_id"), path))
    return sorted(stops)


def learned_stops(format_name: str, context: RenderContext) -> list[int]:
    """Ids of tokens other than EOS that rows of this format teach a model to end its answers with."""
    return context.chat.stops() if format_name == "chat" else []


def stop_tokens(folder: Path, config_eos: Any, format_name: str, context: RenderContext) -> list[int]:
    """Ids that end an answer of a model of `folder` that was trained on rows of this format. Raises UserError
    as `base_stops` does."""
    return sorted({*base_stops(folder, config_eos, context.tokenizer), *learned_stops(format_name, context)})


def generation_config(folder: Path, config: PretrainedConfig, stops: Sequence[int]) -> dict[str, str]:
    """{generation_config.json: its text} of a model that ends its answers with `stops`; {} if that of its
    base, the model in `folder`, says so already, as transformers reads it. Raises UserError as `base_stops`
    does."""
    path = folder / GENERATION_CONFIG
    if path.is_file():
        settings = read_json(path, MAX_CONFIG_BYTES)
    else:  # transformers takes these out of config.json
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {name: i for name in names if (i := getattr(config, name, None)) is not None}
    if set(_ids(settings.get("eos_token_id"), path)) == set(stops):
        return {}
    settings.pop("_from_model_config", None)  # transformers would take the ids out of config.json again
    return {GENERATION_CONFIG: json.dumps(settings | {"eos_token_id": [*stops]}, indent=2) + "\n"}


def _ids(value: Any, path: Path) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise UserError(f"{path}: eos_token_id must be a token's number, or a list of them")
    return ids
