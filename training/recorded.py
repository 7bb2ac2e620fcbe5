"""A run's options as they are kept: what they name is the same from any folder, at any time."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from data.sources import shipped_recipe
from options.config import Config

DATA_OPTIONS = ("dataset", "eval_dataset", "sample_prompts")
# Nodes and --resume compare the contents of what these options name, so paths may differ.
CONTENT_OPTIONS = ("model_name", "llama_pro_path", *DATA_OPTIONS)


def as_recorded(config: Config, model: str) -> Config:
    """The options with absolute paths in the place of local ones. model: `pin_model_name` of --model_name."""
    data: dict[str, Any] = {name: _located(getattr(config, name)) for name in DATA_OPTIONS}
    expanded = None if config.llama_pro_path is None else model
    return dataclasses.replace(config, model_name=model, llama_pro_path=expanded, **data)


def _located(data: str | None) -> str | None:
    """The absolute path of a local file or folder of data; the name of a recipe or of a hub id as it is."""
    if data is None or shipped_recipe(data):
        return data
    local = os.path.expanduser(data)
    return os.path.abspath(local) if os.path.exists(local) else data
