"""Expanded models, and the config.json and tensors of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import block_expansion


def expand(base: Path, out: Path, *options) -> Path:
    """Expand `base` into `out` by block_expansion.py with these options."""
    assert (
        block_expansion.main(["--model_name", str(base), "--output_dir", str(out), *map(str, options)]) == 0
    )
    return out


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def read_config_json(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def text_config_json(folder: Path) -> dict:
    """Return the part of config.json that describes the decoder layers."""
    config = read_config_json(folder)
    return config.get("text_config", config)


def edit_config(folder: Path, **values) -> None:
    """Set values in config.json; None removes one."""
    config = {k: v for k, v in (read_config_json(folder) | values).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
