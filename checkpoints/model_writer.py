"""Writes a model folder of tensors copied out of another folder's files, made, or gathered from a model.

What is copied goes as bytes, PIECE bytes at a time, so host memory does not depend on the size of the model.
Formats as in files/model_folder.py. Everything is written under temporary names; config.json, without which a
folder is no model, gets its own last.
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
from torch import nn

from files.atomic_writes import stage_files, write_text
from files.finite import check_finite
from files.model_folder import CheckpointFiles
from files.names import CONFIG, INDEX, SINGLE_FILE, SMALL_MODEL_FILES
from files.tensors import StoredTensor, read_tensor, write_header
from parallel.shards import gather_to_cpu

PIECE = 2**24  # bytes
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Entry:
    """One tensor to write. pieces: its bytes, little-endian, in order; collective: every rank must take part
    in making them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator]
    collective: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Shards = dict[str, dict[str, Entry]]  # file name -> tensor name -> what to write


def copied(files: CheckpointFiles) -> dict[str, Entry]:
    """Every tensor of a checkpoint, as it is in its file. Pieces raise UserError for NaN and infinity."""
    return {
        name: Entry(t.torch_dtype, t.shape, partial(_file_pieces, files.folder, t, files.tensor_origin(name)))
        for name, t in files.tensors.items()
    }


def check_contents(entries: dict[str, Entry]) -> None:
    """Reads copied tensors once, before anything is written. Raises UserError for NaN and infinity."""
    for entry in entries.values():
        for _ in entry.pieces():
            pass


def filled(like: Entry, value: float) -> Entry:
    """A tensor with the dtype and shape of another, and one value everywhere."""
    number = torch.tensor([value], dtype=like.dtype).view(torch.uint8).numpy().tobytes()

    def pieces():
        for begin in range(0, like.nbytes, PIECE):
            yield number * (min(PIECE, like.nbytes - begin) // len(number))

    return Entry(like.dtype, like.shape, pieces)


def gathered(param: nn.Parameter, dtype: torch.dtype) -> Entry:
    """A parameter, sharded or not, as dtype."""

    def pieces():
        full = gather_to_cpu(param).to(dtype).contiguous()
        yield full.view(-1).view(torch.uint8).numpy().data

    return Entry(dtype, tuple(param.shape), pieces, collective=True)


def _file_pieces(folder: Path, stored: StoredTensor, where: str) -> Iterator:
    step, count = PIECE // stored.torch_dtype.itemsize, math.prod(stored.shape)
    for first in range(0, count, step):
        numbers = read_tensor(folder, stored.flat_slice(first, min(step, count - first)))
        check_finite(where, numbers)
        yield numbers.view(torch.uint8).numpy().data


def in_order(entries: dict[str, Entry]) -> dict[str, Entry]:
    """As they lie in a file: wider dtypes first, so that each number is aligned to its size."""
    return dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))


def write_tensors(path: Path, entries: dict[str, Entry], metadata: dict[str, str] | None = None) -> None:
    """Writes one safetensors file."""
    entries = in_order(entries)
    with path.open("wb") as out:
        write_header(out, entries, metadata)
        for name, entry in entries.items():
            before = out.tell()
            for piece in entry.pieces():
                out.write(piece)
            assert out.tell() - before == entry.nbytes, (
                f"{name}: {out.tell() - before} of {entry.nbytes} bytes"
            )


def write_model(
    folder: Path,
    shards: Shards,
    source: Path,
    small_files: Mapping[str, str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a model folder: weights, index, and small files as `copy_companions` does. metadata: for the
    header of each weights file. A run that ends in the middle leaves no config.json; a full disk, no weights
    either."""
    with stage_files(folder) as stage:
        for file, entries in shards.items():
            write_tensors(stage(file), entries, metadata)
        if list(shards) != [SINGLE_FILE]:
            weight_map = {name: file for file, entries in shards.items() for name in entries}
            index = {"metadata": {"total_size": total_bytes(shards)}, "weight_map": weight_map}
            stage(INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    try:
        copy_companions(source, folder, small_files)
    except OSError:
        for file in (*shards, INDEX):  # nobody could load them, and they take the room that was missing
            (folder / file).unlink(missing_ok=True)
        raise


def total_bytes(shards: Shards) -> int:
    return sum(entry.nbytes for entries in shards.values() for entry in entries.values())


def shards_of(entries: dict[str, Entry], limit: int) -> Shards:
    """Entries in files of at most `limit` bytes (a larger tensor stands alone), under Hugging Face's
    names."""
    plan = plan_shards({name: entry.nbytes for name, entry in entries.items()}, limit)
    return {shard_name(i, len(plan)): {n: entries[n] for n in names} for i, names in enumerate(plan, 1)}


def with_replaced(files: CheckpointFiles, changed: dict[str, Entry]) -> Shards:
    """A checkpoint's shards as they are, but for the tensors in `changed`."""
    shards: Shards = {}
    for name, entry in copied(files).items():
        shards.setdefault(files.tensors[name].file, {})[name] = changed.get(name, entry)
    return shards


def companions(source: Path, patterns: tuple[str, ...] = SMALL_MODEL_FILES) -> list[Path]:
    """A model folder's small files, config.json last: with it a copy is a model folder."""
    found = sorted({p for pattern in patterns for p in source.glob(pattern) if p.is_file()})
    return sorted(found, key=lambda p: p.name == CONFIG)


def copy_companions(
    source: Path, folder: Path, small_files: Mapping[str, str], patterns: tuple[str, ...] = SMALL_MODEL_FILES
) -> None:
    """Copies `companions`. small_files: {name: text} of files that are to be other than source's, or that it
    lacks."""
    kept = [path for path in companions(source, patterns) if path.name not in small_files]
    for path in sorted([*kept, *map(Path, small_files)], key=lambda path: path.name == CONFIG):
        if path.name in small_files:
            write_text(folder / path.name, small_files[path.name])
            continue
        with stage_files(folder) as stage:
            shutil.copyfile(path, stage(path.name))


def as_text(config: dict) -> str:
    """A JSON file of a model folder."""
    return json.dumps(config, indent=2) + "\n"


def shard_name(number: int, shards: int) -> str:
    """Hugging Face's name of a weights file; number counts from 1."""
    return f"model-{number:05d}-of-{shards:05d}.safetensors" if shards > 1 else SINGLE_FILE


def plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into shards of at most `limit` bytes (a larger tensor stands alone)."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, nbytes in sizes.items():
        if shards[-1] and used + nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    return shards
