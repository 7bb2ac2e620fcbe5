"""Writes a model folder from tensors that are copied from another one, computed, or gathered from a model.

Tensors are copied as bytes, CHUNK_BYTES at a time, so host memory does not depend on the size of the model.
Formats are those of files/model_folder.py. Everything is written under temporary names. config.json, without
which a folder is no model, gets its name last.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from files.atomic_writes import stage_files, write_text
from files.expert_stacks import ExpertTensor, join_expert, stacked_shape
from files.finite import check_finite
from files.model_folder import CheckpointFiles
from files.names import CHAT_TEMPLATE, CONFIG, INDEX, SINGLE_FILE, SMALL_MODEL_FILES, TEMPLATE_FILES
from files.tensors import StoredTensor, read_tensor, write_header

CHUNK_BYTES = 2**24  # bytes
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to write.

    Attributes:
        chunks: Returns an iterator over its bytes, little-endian, in order.
        collective: Every rank must run that iterator.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator]
    collective: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


WeightFiles = dict[str, dict[str, TensorEntry]]  # file name -> tensor name -> what to write


def file_entries(files: CheckpointFiles) -> dict[str, TensorEntry]:
    """Return {parameter's name: entry} that copies each tensor of a model's files.

    Reading an entry raises UserError if its tensor holds NaN or infinity.
    """
    return {
        name: TensorEntry(
            t.torch_dtype, t.shape, partial(_read_chunks, files.folder, t, files.tensor_origin(name))
        )
        for name, t in files.tensors.items()
    }


def with_stored_names(
    files: CheckpointFiles,
    entries: dict[str, TensorEntry],
    locate: Callable[[str], tuple[str, str]] | None = None,
) -> dict[str, TensorEntry]:
    """Return entries of parameters by their names in a model's files; experts are stacked again.

    Args:
        files: the model's files.
        entries: {parameter's name: entry}; with one parameter of a stack, all others, in the files' order.
        locate: returns (a parameter of `files` that is stored alike, the name in the files) for a name in
            `entries`; None: they are the parameters of `files`.
    """
    stacks: dict[str, tuple[int, list[TensorEntry]]] = {}
    for name, entry in entries.items():
        source, stored_name = locate(name) if locate else (name, files.stored_name(name))
        stored = files.tensors.get(source)
        parts = stored.parts if isinstance(stored, ExpertTensor) else 0
        stacks.setdefault(stored_name, (parts, []))[1].append(entry)
    return {name: _stacked_entry(e, parts) if parts else e[0] for name, (parts, e) in stacks.items()}


def _stacked_entry(entries: list[TensorEntry], parts: int) -> TensorEntry:
    """Return the entry of a stack of experts (files/expert_stacks.py), of which `parts` are an expert's."""
    first = entries[0]

    def chunks():
        for begin in range(0, len(entries), parts):
            own = [_read_entry(entry) for entry in entries[begin : begin + parts]]
            yield join_expert(own).view(-1).view(torch.uint8).numpy().data

    shape = stacked_shape(first.shape, len(entries), parts)
    return TensorEntry(first.dtype, shape, chunks, any(entry.collective for entry in entries))


def _read_entry(entry: TensorEntry) -> torch.Tensor:
    """Return an entry's tensor. Collective if the entry is."""
    return torch.frombuffer(bytearray().join(entry.chunks()), dtype=entry.dtype).view(entry.shape)


def apart_entries(files: CheckpointFiles) -> dict[str, TensorEntry]:
    """Return {name in the files: entry} that copies the tensors of the parts that were not built."""
    return file_entries(files.apart) if files.apart else {}


def check_entries_finite(entries: dict[str, TensorEntry]) -> None:
    """Raise UserError if an entry of `file_entries` holds NaN or infinity. Reads all of them."""
    for entry in entries.values():
        for _ in entry.chunks():
            pass


def constant_entry(like: TensorEntry, value: float) -> TensorEntry:
    """Return an entry with the dtype and shape of another, filled with one value."""
    number = torch.tensor([value], dtype=like.dtype).view(torch.uint8).numpy().tobytes()

    def chunks():
        for begin in range(0, like.nbytes, CHUNK_BYTES):
            yield number * (min(CHUNK_BYTES, like.nbytes - begin) // len(number))

    return TensorEntry(like.dtype, like.shape, chunks)


def _read_chunks(folder: Path, stored: StoredTensor, origin: str) -> Iterator:
    """Yield a stored tensor's bytes. Raises UserError, which names `origin`, for NaN and infinity."""
    if isinstance(stored, ExpertTensor):
        parameter = stored.read(folder)
        assert isinstance(parameter, torch.Tensor)
        check_finite(origin, parameter)
        yield parameter.view(-1).view(torch.uint8).numpy().data
        return
    step, count = CHUNK_BYTES // stored.torch_dtype.itemsize, math.prod(stored.shape)
    for first in range(0, count, step):
        values = read_tensor(folder, stored.flat_slice(first, min(step, count - first)))
        check_finite(origin, values)
        yield values.view(torch.uint8).numpy().data


def sort_for_file(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return entries in the order in which they are written: wider dtypes first, so elements are aligned."""
    return dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))


def write_tensors(
    path: Path, entries: dict[str, TensorEntry], metadata: dict[str, str] | None = None
) -> None:
    """Write one safetensors file, in place. Collective if an entry is: see `TensorEntry`."""
    entries = sort_for_file(entries)
    with path.open("wb") as out:
        write_header(out, entries, metadata)
        for name, entry in entries.items():
            begin = out.tell()
            for chunk in entry.chunks():
                out.write(chunk)
            written = out.tell() - begin
            assert written == entry.nbytes, f"{name}: {written} of {entry.nbytes} bytes"


def write_model(
    folder: Path,
    weight_files: WeightFiles,
    source: Path,
    small_files: Mapping[str, str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a model folder: weights, their index, and small files.

    An interrupted call leaves no config.json; a full disk leaves no weights either.

    Args:
        source: The model folder whose small files are copied.
        small_files: {name: text} of small files that differ from source's, or that it lacks.
        metadata: For the header of each weights file.
    """
    with stage_files(folder) as stage:
        for file, entries in weight_files.items():
            write_tensors(stage(file), entries, metadata)
        if list(weight_files) != [SINGLE_FILE]:
            weight_map = {name: file for file, entries in weight_files.items() for name in entries}
            index = {"metadata": {"total_size": total_bytes(weight_files)}, "weight_map": weight_map}
            stage(INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    try:
        copy_small_files(source, folder, small_files)
    except OSError:
        for file in (*weight_files, INDEX):  # useless without config.json, and they fill the disk
            (folder / file).unlink(missing_ok=True)
        raise


def total_bytes(weight_files: WeightFiles) -> int:
    """Return the number of bytes of all tensors together."""
    return sum(entry.nbytes for entries in weight_files.values() for entry in entries.values())


def split_into_files(entries: dict[str, TensorEntry], max_bytes: int) -> WeightFiles:
    """Return entries split, in order, into files of at most `max_bytes`, with Hugging Face's file names.

    A larger tensor gets its own file.
    """
    plan = plan_shards({name: entry.nbytes for name, entry in entries.items()}, max_bytes)
    return {shard_name(i, len(plan)): {n: entries[n] for n in names} for i, names in enumerate(plan, 1)}


def replace_entries(files: CheckpointFiles, changed: dict[str, TensorEntry]) -> WeightFiles:
    """Return entries that copy a model's files, but for the parameters in `changed`. No name changes."""
    weight_files: WeightFiles = {}
    places = {files.stored_name(name): stored.file for name, stored in files.tensors.items()}
    for name, entry in with_stored_names(files, file_entries(files) | changed).items():
        weight_files.setdefault(places[name], {})[name] = entry
    for name, entry in apart_entries(files).items():
        assert files.apart
        weight_files.setdefault(files.apart.tensors[name].file, {})[name] = entry
    return weight_files


def list_small_files(source: Path, patterns: tuple[str, ...] = SMALL_MODEL_FILES) -> list[Path]:
    """Return the files in a model folder that match `patterns`, config.json last."""
    found = sorted({p for pattern in patterns for p in source.glob(pattern) if p.is_file()})
    return sorted(found, key=lambda p: p.name == CONFIG)


def copy_small_files(
    source: Path, folder: Path, small_files: Mapping[str, str], patterns: tuple[str, ...] = SMALL_MODEL_FILES
) -> None:
    """Copy the files of `source` that match `patterns`, and write `small_files`; config.json last.

    A chat template among `small_files` replaces all of source's, also those for rows with tools.

    Args:
        source: the model folder to copy from.
        folder: the folder to write into.
        small_files: {name: text} of files that differ from source's, or that it lacks.
        patterns: glob patterns, relative to `source`, of the files to copy.

    Raises OSError.
    """
    replaced = list_small_files(source, TEMPLATE_FILES) if CHAT_TEMPLATE in small_files else []
    copied = [path for path in list_small_files(source, patterns) if path not in replaced]
    unchanged = [path for path in copied if path.name not in small_files]
    for path in sorted([*unchanged, *map(Path, small_files)], key=lambda path: path.name == CONFIG):
        if path.name in small_files:
            write_text(folder / path.name, small_files[path.name])
            continue
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        with stage_files(target.parent) as stage:
            shutil.copyfile(path, stage(target.name))


def to_json_text(config: dict) -> str:
    """Return the text of a config.json with these contents."""
    return json.dumps(config, indent=2) + "\n"


def shard_name(number: int, count: int) -> str:
    """Return Hugging Face's name of weights file `number` of `count`; number counts from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE_FILE


def plan_shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Return the tensor names of each file, in order, with at most `max_bytes` of tensors in a file.

    A larger tensor gets its own file. sizes: {tensor name: bytes}.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, nbytes in sizes.items():
        if shards[-1] and used + nbytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    return shards
