"""Checkpoints that take no room on the disk: their weights are holes, which benchmarks.limited fills.

Two programs that read the same `empty` checkpoint would free each other's blocks, so each needs its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from benchmarks.make_checkpoint import EMPTY, write_empty
from checkpoints.block_expansion import expanded_config, expanded_tensors
from files.model_folder import CheckpointFiles
from files.names import CONFIG, SINGLE_FILE, TOKENIZER_TEXTS
from models.llama_pro import source_layers, spread_new_blocks
from models.registry import read_config


def write_sparse_copy(source: Path, target: Path, new_blocks: int = 0) -> None:
    """Write an `empty` checkpoint of the same shapes, in bf16.

    Args:
        source: a checkpoint, empty or not.
        target: a new folder.
        new_blocks: layers to add, as block_expansion.py does.
    """
    config, family = read_config(source)
    files, layers = CheckpointFiles(source), config.num_hidden_layers
    originals = source_layers(layers, spread_new_blocks(layers, new_blocks) if new_blocks else [])
    raw = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    target.mkdir(parents=True)
    entries = expanded_tensors(files, family, originals)
    options = {"dtype": torch.bfloat16, "device": "meta"}
    tensors = {name: torch.empty(entry.shape, **options) for name, entry in entries.items()}
    write_empty(target / SINGLE_FILE, tensors)
    new_config = expanded_config(raw, config, originals) if new_blocks else raw
    (target / CONFIG).write_text(json.dumps(new_config), encoding="utf-8")
    for path in source.iterdir():
        if path.name in TOKENIZER_TEXTS:
            shutil.copy(path, target)
    (target / EMPTY).touch()
