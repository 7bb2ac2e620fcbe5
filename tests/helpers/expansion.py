"""Expanded models, and the config.json and the tensors of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import block_expansion


def expand(base: Path, out: Path, *how) -> Path:
    """By the command itself, with its options `how`."""
    assert block_expansion.main(["--model_name", str(base), "--output_dir", str(out), *map(str, how)]) == 0
    return out


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def described(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def edit(folder: Path, **values) -> None:
    """Sets values in config.json; None takes one out."""
    config = {k: v for k, v in (described(folder) | values).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
