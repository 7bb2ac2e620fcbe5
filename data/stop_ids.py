"""Find the tokens that end an answer, for training's samples, evaluate.py, generate.py and saved models."""

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


def read_base_stop_ids(folder: Path, config_eos: Any, tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that end an answer of the model in `folder`.

    They are its tokenizer's EOS, and those in generation_config.json and config.json. config_eos:
    `eos_token_id` of config.json. Raises UserError for values that are no ids.
    """
    stop_ids = set(_check_ids(config_eos, folder / CONFIG))
    if tokenizer.eos_token_id is not None:
        stop_ids.add(tokenizer.eos_token_id)
    path = folder / GENERATION_CONFIG
    if path.is_file():
        stop_ids.update(_check_ids(read_json(path, MAX_CONFIG_BYTES).get("eos_token_id"), path))
    return sorted(stop_ids)


def learned_stop_ids(format_name: str, context: RenderContext) -> list[int]:
    """Return the ids of the tokens with which the chat template ends answers; [] for other formats."""
    return context.chat.find_stop_ids() if format_name == "chat" else []


def collect_stop_ids(folder: Path, config_eos: Any, format_name: str, context: RenderContext) -> list[int]:
    """Return the ids of the tokens that end an answer of a model of `folder`, trained on rows of this format.

    Args:
        folder: the model's folder, whose generation_config.json is read if there is one.
        config_eos: `eos_token_id` of its config.json: an id, a list of ids or None.
        format_name: the format of the rows, a key of FORMATS.
        context: the tokenizer, and the chat template of the `chat` format.

    Raises UserError as `read_base_stop_ids` does.
    """
    base_ids = read_base_stop_ids(folder, config_eos, context.tokenizer)
    return sorted({*base_ids, *learned_stop_ids(format_name, context)})


def make_generation_config(folder: Path, config: PretrainedConfig, stop_ids: Sequence[int]) -> dict[str, str]:
    """Return {generation_config.json: its text} for a model that ends its answers with `stop_ids`.

    Returns {} if transformers already reads these ids from the base, the model in `folder`. Raises UserError
    as `read_base_stop_ids` does.
    """
    path = folder / GENERATION_CONFIG
    if path.is_file():
        settings = read_json(path, MAX_CONFIG_BYTES)
    else:  # transformers takes these out of config.json
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {name: i for name in names if (i := getattr(config, name, None)) is not None}
    if set(_check_ids(settings.get("eos_token_id"), path)) == set(stop_ids):
        return {}
    settings.pop("_from_model_config", None)  # transformers would take the ids out of config.json again
    return {GENERATION_CONFIG: json.dumps(settings | {"eos_token_id": [*stop_ids]}, indent=2) + "\n"}


def _check_ids(value: Any, path: Path) -> list[int]:
    """Return an `eos_token_id` as a list; [] for None. Raises UserError, which names `path`, for others."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise UserError(f"{path}: eos_token_id must be a token's number, or a list of them")
    return ids
