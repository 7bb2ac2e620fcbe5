"""The tensors in the files of a model's folder, to be read and changed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from files.names import INDEX, SINGLE


def file_of(folder: Path, name: str) -> Path:
    """The file that holds a tensor."""
    if not (folder / INDEX).exists():
        return folder / SINGLE
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def stored(folder: Path, name: str) -> torch.Tensor:
    return load_file(file_of(folder, name))[name]


def put_tensor(folder: Path, name: str, tensor: torch.Tensor, beside: str = "model.norm.weight") -> Path:
    """Puts a tensor into the folder's files, a new one into the file that holds `beside`. Returns its file."""
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"].setdefault(name, index["weight_map"][beside])
        (folder / INDEX).write_text(json.dumps(index))
    path = file_of(folder, name)
    save_file(load_file(path) | {name: tensor.contiguous()}, path, metadata={"format": "pt"})
    return path
