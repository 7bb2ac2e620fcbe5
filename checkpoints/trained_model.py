"""Saves runs without adapters: the full trained model, or only Llama-Pro's new blocks.

Rank 0 writes, in the format of checkpoints/model_writer.py. All ranks take part in gathering each tensor.
`open_blocks` reads blocks that were saved alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from checkpoints.gathered_tensors import gathered_entries
from checkpoints.model_writer import (
    SHARD_BYTES,
    TensorEntry,
    WeightFiles,
    apart_entries,
    file_entries,
    replace_entries,
    sort_for_file,
    split_into_files,
    total_bytes,
    with_stored_names,
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
from quantization.layer import locate_tensor, parameters_from


def _trained_blocks(model: PreTrainedModel, family: Family, files: CheckpointFiles) -> dict[str, TensorEntry]:
    """Return {name: gathered entry} of the new layers' parameters, in the dtypes of the model's files.

    Fixed parameters are copied from the files. Raises AssertionError unless exactly the others are trained.
    """
    new = new_layers(model.config)
    names = [name for name in files.tensors if family.locate_layer(name)[0] in new]
    trained = [name for name in names if not family.is_fixed(name)]
    filled = _tensors_by_parameter(model, files)
    assert {n for p, names in filled.items() if p.requires_grad for n in names} == set(trained)
    copied = {name: entry for name, entry in file_entries(files).items() if name in names}
    return copied | gathered_entries(model, trained, _stored_dtypes(files))


def _tensors_by_parameter(model: PreTrainedModel, files: CheckpointFiles) -> dict[nn.Parameter, list[str]]:
    """Return {parameter: names of the tensors that fill it}, in the orders of the model and of the files."""
    params = {unwrapped_name(name): p for name, p in model.named_parameters()}  # a tied head is listed once
    filled: dict[nn.Parameter, list[str]] = {parameter: [] for parameter in params.values()}
    for name in files.tensors:
        path, module, attribute = locate_tensor(model, name)
        for key in parameters_from(module, attribute):
            filled[params[f"{path}.{key}"]].append(name)
    return filled


def _stored_dtypes(files: CheckpointFiles) -> dict[str, torch.dtype]:
    return {name: stored.torch_dtype for name, stored in files.tensors.items()}


def save_model(
    model: PreTrainedModel,
    folder: Path,
    files: CheckpointFiles,
    base: BaseModel,
    small_files: Mapping[str, str],
) -> None:
    """Write the full trained model, with the base's tensor names, dtypes, config and tokenizer.

    The parts of a wrapper that were not built, or not trained, are copied from the base's files. Collective;
    rank 0 writes, one tensor at a time, and raises OSError.

    Args:
        files: The base's files.
        small_files: {name: text} of small files that differ from the base's, or that it lacks.
    """
    filled = _tensors_by_parameter(model, files)
    trained = [name for p, names in filled.items() if p.requires_grad for name in names]
    available = file_entries(files) | gathered_entries(model, trained, _stored_dtypes(files))
    entries = {name: available[name] for names in filled.values() for name in names}
    entries = with_stored_names(files, entries) | apart_entries(files)
    _write_model_collectively(folder, split_into_files(entries, SHARD_BYTES), files, base, small_files)


def save_expanded(
    model: PreTrainedModel,
    family: Family,
    folder: Path,
    files: CheckpointFiles,
    base: BaseModel,
    small_files: Mapping[str, str],
) -> None:
    """Write the full expanded model: trained new blocks, and the other tensors of `files`. Collective.

    The other tensors are copied from the files, not from the quantized model. Rank 0 writes, and raises
    OSError.

    Args:
        files: The expanded model's files: the result has the same file names and dtypes.
        small_files: {name: text} of small files that differ from the expanded model's, or that it lacks.
    """
    weight_files = replace_entries(files, _trained_blocks(model, family, files))
    _write_model_collectively(folder, weight_files, files, base, small_files)


def _write_model_collectively(
    folder: Path,
    weight_files: WeightFiles,
    files: CheckpointFiles,
    base: BaseModel,
    small_files: Mapping[str, str],
) -> None:
    """Write a model folder on rank 0, which raises OSError. Collective."""

    def write(tracked: WeightFiles) -> None:
        write_model(folder, tracked, files.folder, small_files, base.metadata())

    _write_collectively(folder, weight_files, write)


def _write_collectively(
    folder: Path, weight_files: WeightFiles, write: Callable[[WeightFiles], None]
) -> None:
    """Let rank 0 call write(weight_files) while the other ranks take part in gathering. Collective.

    If rank 0 cannot write, the other ranks do not know it: it joins the remaining collectives, and raises
    OSError then.
    """
    begun: set[str] = set()

    def track(name: str, entry: TensorEntry) -> TensorEntry:
        """Return an entry that adds its name to `begun` when its chunks are asked for."""

        def chunks():
            begun.add(name)
            yield from entry.chunks()

        return dataclasses.replace(entry, chunks=chunks)

    failure = None
    if dist.get_rank() == 0:
        tracked = {
            file: {n: track(n, e) for n, e in entries.items()} for file, entries in weight_files.items()
        }
        try:
            check_free_space(folder, total_bytes(weight_files))
            write(tracked)
        except OSError as e:  # after other errors, such as a dead rank, no collective can be completed
            failure = e
    for entries in weight_files.values():
        _run_collectives({name: entry for name, entry in entries.items() if name not in begun})
    if failure:
        raise failure


def save_blocks(
    model: PreTrainedModel,
    family: Family,
    folder: Path,
    files: CheckpointFiles,
    base: BaseModel,
    extra_files: Mapping[str, str],
) -> None:
    """Write only the new blocks, with the expanded model's tensor names. Collective; rank 0 writes.

    The header's metadata has the indices of their layers, and names the expanded model. Rank 0 raises
    OSError.

    Args:
        files: The expanded model's files.
        base: The expanded model.
        extra_files: {name: text} of more files to write.
    """
    entries = with_stored_names(files, _trained_blocks(model, family, files))
    layers = json.dumps(new_layers(model.config))
    metadata = {"base_model_name_or_path": base.name, NEW_LAYERS: layers} | base.metadata()
    metadata |= {"revision": base.revision} if base.revision else {}

    def write(tracked: WeightFiles) -> None:
        with stage_files(folder) as stage:
            for name, text in extra_files.items():
                stage(name).write_text(text, encoding="utf-8")
            write_tensors(stage(BLOCKS), tracked[BLOCKS], metadata)

    _write_collectively(folder, {BLOCKS: entries}, write)


def _run_collectives(entries: dict[str, TensorEntry]) -> None:
    """Take part in gathering tensors that another rank writes, in the order in which it writes them."""
    for entry in sort_for_file(entries).values():
        if entry.collective:
            for _ in entry.chunks():
                pass


def open_blocks(
    path: Path, files: CheckpointFiles, family: Family, layers: list[int]
) -> tuple[CheckpointFiles, dict[str, str]]:
    """Open a file of `save_blocks`. Return (its tensors, the metadata in its header).

    Args:
        files: The expanded model that the blocks belong to.
        layers: The indices of its new layers.

    Raises UserError unless the file holds exactly the tensors of these layers, with their shapes.
    """
    blocks = CheckpointFiles(path.parent, only_file=path.name)
    parameters = {stored: name for name, stored in files.stored_names.items()}
    blocks.rename(lambda stored: parameters.get(stored, stored), family.is_unused)
    if family.stacks_experts:
        blocks.split_experts()
    metadata = read_header(path)[0].get("__metadata__") or {}
    stored_layers = metadata.get(NEW_LAYERS)
    if stored_layers is None:
        raise UserError(f"{path}: not a file of new blocks, which `--llama_pro_save blocks` writes")
    if stored_layers != json.dumps(layers):
        raise UserError(f"{path}: has the new layers {stored_layers}, but {files.folder} has {layers}")
    expected = {name for name in files.tensors if family.locate_layer(name)[0] in layers}
    for name in sorted(expected ^ set(blocks.tensors)):
        is_missing = name in expected
        error = f"{name} is missing" if is_missing else f"{name} is in no new layer of {files.folder}"
        raise UserError(f"{path}: {error}")
    for name, stored in blocks.tensors.items():
        if stored.shape != files.tensors[name].shape:
            raise UserError(
                f"{path}: {name} has shape {list(stored.shape)}, but {files.folder} has"
                f" {list(files.tensors[name].shape)}"
            )
    return blocks, metadata
