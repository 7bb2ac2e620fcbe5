"""What a run without adapters saves: the whole trained model, or Llama-Pro's new blocks alone.

Rank 0 writes, in the format of checkpoints/model_writer.py; all ranks take part in gathering each tensor.
`open_blocks` reads blocks that were saved alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedModel

from checkpoints.model_writer import (
    SHARD_BYTES,
    Entry,
    Shards,
    gathered,
    in_order,
    shards_of,
    total_bytes,
    with_replaced,
    write_model,
    write_tensors,
)
from files.atomic_writes import stage_files
from files.base_model import BaseModel
from files.disk_room import check_free_space
from files.model_folder import CheckpointFiles
from files.names import BLOCKS
from files.tensors import read_header
from models.family import Family, unwrapped_name
from models.llama_pro import NEW_LAYERS, new_layers
from options.errors import UserError


def _trained_blocks(model: PreTrainedModel, family: Family, files: CheckpointFiles) -> dict[str, Entry]:
    """The parameters of the new layers, in the checkpoint's dtypes."""
    new, params = new_layers(model.config), {unwrapped_name(name): p for name, p in model.named_parameters()}
    names = [name for name in files.tensors if family.locate_layer(name)[0] in new]
    assert {n for n, p in params.items() if p.requires_grad} == set(names)
    return {name: gathered(params[name], files.tensors[name].torch_dtype) for name in names}


def save_model(
    model: PreTrainedModel,
    folder: Path,
    files: CheckpointFiles,
    base: BaseModel,
    small_files: Mapping[str, str],
) -> None:
    """Writes a whole trained model as the base's folder is laid out: same names, dtypes, config and
    tokenizer, but for `small_files`, {name: text}. Collective; rank 0 writes, one tensor at a time."""
    params = {unwrapped_name(name): p for name, p in model.named_parameters()}  # a tied head is listed once
    entries = {name: gathered(p, files.tensors[name].torch_dtype) for name, p in params.items()}
    _write_together(folder, shards_of(entries, SHARD_BYTES), files, base, small_files)


def save_expanded(
    model: PreTrainedModel,
    family: Family,
    folder: Path,
    files: CheckpointFiles,
    base: BaseModel,
    small_files: Mapping[str, str],
) -> None:
    """Writes the folder that was trained from, with its new blocks as they are now: same file names, dtypes,
    config and tokenizer, but for `small_files`, {name: text}. The old blocks are the files', not the
    quantized ones. Collective; rank 0 writes."""
    shards = with_replaced(files, _trained_blocks(model, family, files))
    _write_together(folder, shards, files, base, small_files)


def _write_together(
    folder: Path, shards: Shards, files: CheckpointFiles, base: BaseModel, small_files: Mapping[str, str]
) -> None:
    def write(noted: Shards) -> None:
        write_model(folder, noted, files.folder, small_files, base.metadata())

    _together(folder, shards, write)


def _together(folder: Path, shards: Shards, write: Callable[[Shards], None]) -> None:
    """Rank 0 writes, the other ranks take part in making the tensors. If it cannot write, which they do not
    know, it takes part in what is left as they do, and raises OSError then. Collective."""
    begun: set[str] = set()

    def noted(name: str, entry: Entry) -> Entry:
        def pieces():
            begun.add(name)
            yield from entry.pieces()

        return dataclasses.replace(entry, pieces=pieces)

    failure = None
    if dist.get_rank() == 0:
        try:
            check_free_space(folder, total_bytes(shards))
            write({file: {n: noted(n, e) for n, e in entries.items()} for file, entries in shards.items()})
        except OSError as e:  # after another error, as of a rank that is gone, nothing can be made together
            failure = e
    for entries in shards.values():
        _take_part({name: entry for name, entry in entries.items() if name not in begun})
    if failure:
        raise failure


def save_blocks(
    model: PreTrainedModel,
    family: Family,
    folder: Path,
    files: CheckpointFiles,
    base: BaseModel,
    beside: Mapping[str, str],
) -> None:
    """Writes the new blocks alone, under the expanded model's names. The header's metadata has their layers,
    and names the expanded model, `base`. beside: {name: text} of more files to write. Collective; rank 0
    writes."""
    entries, layers = _trained_blocks(model, family, files), json.dumps(new_layers(model.config))
    metadata = {"base_model_name_or_path": base.name, NEW_LAYERS: layers} | base.metadata()
    metadata |= {"revision": base.revision} if base.revision else {}

    def write(shards: Shards) -> None:
        with stage_files(folder) as stage:
            for name, text in beside.items():
                stage(name).write_text(text, encoding="utf-8")
            write_tensors(stage(BLOCKS), shards[BLOCKS], metadata)

    _together(folder, {BLOCKS: entries}, write)


def _take_part(entries: dict[str, Entry]) -> None:
    """Makes what needs all ranks of `entries`, in the order in which they are written, for another rank."""
    for entry in in_order(entries).values():
        if entry.collective:
            for _ in entry.pieces():
                pass


def open_blocks(
    path: Path, files: CheckpointFiles, family: Family, layers: list[int]
) -> tuple[CheckpointFiles, dict[str, str]]:
    """(the tensors, the header's metadata) of what `save_blocks` wrote, to be put into the expanded model in
    `files` with the new layers `layers`. Raises UserError unless it holds exactly their tensors."""
    blocks = CheckpointFiles(path.parent, only_file=path.name)
    metadata = read_header(path)[0].get("__metadata__") or {}
    held = metadata.get(NEW_LAYERS)
    if held is None:
        raise UserError(f"{path}: not a file of new blocks, as `--llama_pro_save blocks` leaves them")
    if held != json.dumps(layers):
        raise UserError(f"{path}: has the new layers {held}, but {files.folder} has {layers}")
    wanted = {name for name in files.tensors if family.locate_layer(name)[0] in layers}
    for name in sorted(wanted ^ set(blocks.tensors)):
        what = f"{name} is missing" if name in wanted else f"{name} is in no new layer of {files.folder}"
        raise UserError(f"{path}: {what}")
    for name, stored in blocks.tensors.items():
        if stored.shape != files.tensors[name].shape:
            raise UserError(
                f"{path}: {name} has shape {list(stored.shape)}, but {files.folder} has"
                f" {list(files.tensors[name].shape)}"
            )
    return blocks, metadata
