"""A run's options as config.yaml records them: their paths and names mean the same from any folder."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from data.dataset_names import make_name_absolute
from options.config import Config

DATA_OPTIONS = ("dataset", "eval_dataset", "sample_prompts")
# Nodes and --resume compare the contents of what these options name, so paths may differ.
CONTENT_OPTIONS = ("model_name", "llama_pro_path", "adapter", "image_folder", *DATA_OPTIONS)


def make_paths_absolute(config: Config, model_name: str) -> Config:
    """Return the options with absolute local paths. model_name: the `pin_model_name` of --model_name."""
    given = {name: getattr(config, name) for name in DATA_OPTIONS}
    data: dict[str, Any] = {
        name: make_name_absolute(value) for name, value in given.items() if value is not None
    }
    if config.image_folder is not None:
        data["image_folder"] = os.path.abspath(os.path.expanduser(config.image_folder))
    expanded = None if config.llama_pro_path is None else model_name
    return dataclasses.replace(config, model_name=model_name, llama_pro_path=expanded, **data)
