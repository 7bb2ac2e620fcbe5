"""A run's options as they are kept: what they name on a disk or on the hub is the same from any folder, at any time."""

from __future__ import annotations

import dataclasses

from options.config import Config

# Options whose contents all nodes and --resume compare, so that a path may differ.
NAMED = ("model_name", "llama_pro_path")


def as_recorded(config: Config, model: str) -> Config:
    """The options with what they name recorded for good. model: `recorded_name` of --model_name."""
    expanded = None if config.llama_pro_path is None else model
    return dataclasses.replace(config, model_name=model, llama_pro_path=expanded)
