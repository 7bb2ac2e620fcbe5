"""Reading and changing the tensors in the files of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from files.names import INDEX, SINGLE_FILE


def find_tensor_file(folder: Path, name: str) -> Path:
    """Return the file that holds a tensor."""
    if not (folder / INDEX).exists():
        return folder / SINGLE_FILE
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def read_stored_tensor(folder: Path, name: str) -> torch.Tensor:
    return load_file(find_tensor_file(folder, name))[name]


def put_tensor(folder: Path, name: str, tensor: torch.Tensor, neighbor: str = "model.norm.weight") -> Path:
    """Write a tensor into the folder's files and return its file; a new one joins the tensor `neighbor`."""
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"].setdefault(name, index["weight_map"][neighbor])
        (folder / INDEX).write_text(json.dumps(index))
    path = find_tensor_file(folder, name)
    save_file(load_file(path) | {name: tensor.contiguous()}, path, metadata={"format": "pt"})
    return path


def write_dense(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weights of a checkpoint."""
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink(missing_ok=True)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
