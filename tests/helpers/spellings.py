"""The names that tensors of one model have in files of different makers and versions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from files.names import INDEX

PROJECTOR_AND_TOWER = ("multi_modal_projector.", "vision_tower.", "visual.")


def is_of_a_tower(name: str) -> bool:
    """Return whether a tensor belongs to the parts of a wrapper that text does not need, in any spelling."""
    return name.removeprefix("model.").startswith(PROJECTOR_AND_TOWER)


def _on_the_hub(name: str) -> str:
    """transformers 4's names, which the hub's files of wrappers have, and transformers 5 writes again."""
    return name.replace("vision_tower.embeddings", "vision_tower.vision_model.embeddings").replace(
        "vision_tower.encoder", "vision_tower.vision_model.encoder"
    )


def _in_memory(name: str) -> str:
    """The names of transformers 5's parameters."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith(PROJECTOR_AND_TOWER):
        return f"model.{name}"
    return name.replace("language_model.model.", "model.language_model.")


def _without_head(name: str) -> str:
    """The names of a model that was saved without its head class: those in memory without `model.`."""
    return _in_memory(name).removeprefix("model.")


def _model_twice(name: str) -> str:
    """The names that some versions of transformers 5 wrote, with one `model.` too many."""
    return _in_memory(name).replace("model.language_model.", "model.language_model.model.")


# The spellings of a wrapper's files: each a function of the names that transformers 5 writes for a model that
# it made itself.
SPELLINGS: dict[str, Callable[[str], str]] = {
    "hub": _on_the_hub,
    "memory": _in_memory,
    "without head": _without_head,
    "model twice": _model_twice,
}


def respell(base: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """Write a copy of a checkpoint whose files name the tensors by `rename`."""
    shutil.copytree(base, folder)
    for path in folder.glob("*.safetensors"):
        save_file({rename(n): t for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {rename(n): file for n, file in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))
    return folder
