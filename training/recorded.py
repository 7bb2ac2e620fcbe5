"""A run's options as config.yaml records them: their paths and names mean the same from any folder."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from data.sources import find_shipped_recipe
from options.config import Config

DATA_OPTIONS = ("dataset", "eval_dataset", "sample_prompts")
# Nodes and --resume compare the contents of what these options name, so paths may differ.
CONTENT_OPTIONS = ("model_name", "llama_pro_path", *DATA_OPTIONS)


def make_paths_absolute(config: Config, model_name: str) -> Config:
    """Return the options with absolute local paths. model_name: the `pin_model_name` of --model_name."""
    data: dict[str, Any] = {name: _absolute_path(getattr(config, name)) for name in DATA_OPTIONS}
    expanded = None if config.llama_pro_path is None else model_name
    return dataclasses.replace(config, model_name=model_name, llama_pro_path=expanded, **data)


def _absolute_path(data: str | None) -> str | None:
    """Return the absolute path of a local data file or folder; a recipe's name or a hub id unchanged."""
    if data is None or find_shipped_recipe(data):
        return data
    local = os.path.expanduser(data)
    return os.path.abspath(local) if os.path.exists(local) else data
