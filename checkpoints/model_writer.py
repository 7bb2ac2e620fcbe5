"""Writes a model folder out of another one's files: with more layers, or with some tensors trained.

What does not change is copied as bytes, PIECE bytes at a time, so host memory does not depend on the size of
the model. Formats as in files/model_folder.py. Everything is written under temporary names; config.json, without
which a folder is no model, gets its own last.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from files.model_folder import INDEX, SINGLE, CheckpointFiles
from files.output_folder import BLOCKS, check_room, copy_companions, gather, plan_shards, shard_name, staged
from files.tensors import read_header, write_header
from models.family import Family, clean
from models.llama_pro import NEW_LAYERS, new_layers
from options.errors import UserError

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
    """Every tensor of a checkpoint, as it is in its file."""
    paths = {file: files.folder / file for file in {stored.file for stored in files.tensors.values()}}
    return {
        name: Entry(
            t.dtype, t.shape, _file_pieces(paths[t.file], t.begin, math.prod(t.shape) * t.dtype.itemsize)
        )
        for name, t in files.tensors.items()
    }


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
        full = gather(param).to(dtype).contiguous()
        yield full.view(-1).view(torch.uint8).numpy().data

    return Entry(dtype, tuple(param.shape), pieces, collective=True)


def _file_pieces(path: Path, begin: int, nbytes: int) -> Callable[[], Iterator[bytes]]:
    def pieces():
        with path.open("rb") as file:
            file.seek(begin)
            for done in range(0, nbytes, PIECE):
                yield file.read(min(PIECE, nbytes - done))

    return pieces


def _in_order(entries: dict[str, Entry]) -> dict[str, Entry]:
    """As they lie in a file: wider dtypes first, so that each number is aligned to its size."""
    return dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))


def write_tensors(path: Path, entries: dict[str, Entry], metadata: dict[str, str] | None = None) -> None:
    """Writes one safetensors file."""
    entries = _in_order(entries)
    with path.open("wb") as out:
        write_header(out, entries, metadata)
        for name, entry in entries.items():
            before = out.tell()
            for piece in entry.pieces():
                out.write(piece)
            assert out.tell() - before == entry.nbytes, (
                f"{name}: {out.tell() - before} of {entry.nbytes} bytes"
            )


def write_model(folder: Path, shards: Shards, source: Path, config: dict | None = None) -> None:
    """Writes a model folder: weights, index, and `source`'s small files, with `config` as config.json if it is
    given. A run that ends in the middle leaves no config.json; a full disk, no weights either."""
    with staged(folder) as stage:
        for file, entries in shards.items():
            write_tensors(stage(file), entries)
        if list(shards) != [SINGLE]:
            weight_map = {name: file for file, entries in shards.items() for name in entries}
            index = {"metadata": {"total_size": total_bytes(shards)}, "weight_map": weight_map}
            stage(INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    try:
        copy_companions(source, folder, config)
    except OSError:
        for file in (*shards, INDEX):  # nobody could load them, and they take the room that was missing
            (folder / file).unlink(missing_ok=True)
        raise


def total_bytes(shards: Shards) -> int:
    return sum(entry.nbytes for entries in shards.values() for entry in entries.values())


def shards_of(entries: dict[str, Entry], limit: int) -> Shards:
    """Entries in files of at most `limit` bytes (a larger tensor stands alone), under Hugging Face's names."""
    plan = plan_shards({name: entry.nbytes for name, entry in entries.items()}, limit)
    return {shard_name(i, len(plan)): {n: entries[n] for n in names} for i, names in enumerate(plan, 1)}


def with_replaced(files: CheckpointFiles, changed: dict[str, Entry]) -> Shards:
    """A checkpoint's shards as they are, but for the tensors in `changed`."""
    shards: Shards = {}
    for name, entry in copied(files).items():
        shards.setdefault(files.tensors[name].file, {})[name] = changed.get(name, entry)
    return shards


def _trained_blocks(model: nn.Module, family: Family, files: CheckpointFiles) -> dict[str, Entry]:
    """The parameters of the new layers, in the checkpoint's dtypes."""
    new, params = new_layers(model.config), {clean(name): p for name, p in model.named_parameters()}
    names = [name for name in files.tensors if family.place(name)[0] in new]
    assert {n for n, p in params.items() if p.requires_grad} == set(names)
    return {name: gathered(params[name], files.tensors[name].dtype) for name in names}


def save_model(model: nn.Module, folder: Path, files: CheckpointFiles) -> None:
    """Writes a whole trained model as the base's folder is laid out: same names, dtypes, config and tokenizer.
    Collective; rank 0 writes, one tensor at a time."""
    params = {clean(name): p for name, p in model.named_parameters()}  # a tied head is listed once
    entries = {name: gathered(p, files.tensors[name].dtype) for name, p in params.items()}
    _write_together(folder, shards_of(entries, SHARD_BYTES), files.folder)


def save_expanded(model: nn.Module, family: Family, folder: Path, files: CheckpointFiles) -> None:
    """Writes the folder that was trained from, with its new blocks as they are now: same file names, dtypes,
    config and tokenizer. The old blocks are the files', not the quantized ones. Collective; rank 0 writes."""
    _write_together(folder, with_replaced(files, _trained_blocks(model, family, files)), files.folder)


def _write_together(folder: Path, shards: Shards, source: Path) -> None:
    _together(folder, shards, lambda noted: write_model(folder, noted, source))


def _together(folder: Path, shards: Shards, write: Callable[[Shards], None]) -> None:
    """Rank 0 writes, the other ranks take part in making the tensors. If it cannot write, which they do not know, it
    takes part in what is left as they do, and raises OSError then. Collective."""
    begun: set[str] = set()

    def noted(name: str, entry: Entry) -> Entry:
        def pieces():
            begun.add(name)
            yield from entry.pieces()

        return dataclasses.replace(entry, pieces=pieces)

    failure = None
    if dist.get_rank() == 0:
        try:
            check_room(folder, total_bytes(shards))
            write({file: {n: noted(n, e) for n, e in entries.items()} for file, entries in shards.items()})
        except OSError as e:  # after another error, as of a rank that is gone, nothing can be made together
            failure = e
    for entries in shards.values():
        _take_part({name: entry for name, entry in entries.items() if name not in begun})
    if failure:
        raise failure


def save_blocks(
    model: nn.Module, family: Family, folder: Path, files: CheckpointFiles, base: str, digest: str
) -> None:
    """Writes the new blocks alone, under the expanded model's names. The header's metadata has their layers, and the
    name and `base_digest` of the expanded model. Collective; rank 0 writes."""
    entries, layers = _trained_blocks(model, family, files), json.dumps(new_layers(model.config))
    metadata = {"base_model_name_or_path": base, "base_digest": digest, NEW_LAYERS: layers}

    def write(shards: Shards) -> None:
        with staged(folder) as stage:
            write_tensors(stage(BLOCKS), shards[BLOCKS], metadata)

    _together(folder, {BLOCKS: entries}, write)


def _take_part(entries: dict[str, Entry]) -> None:
    """Makes what needs all ranks of `entries`, in the order in which they are written, for another rank."""
    for entry in _in_order(entries).values():
        if entry.collective:
            for _ in entry.pieces():
                pass


def open_blocks(
    path: Path, files: CheckpointFiles, family: Family, layers: list[int]
) -> tuple[CheckpointFiles, dict[str, str]]:
    """(the tensors, the header's metadata) of what `save_blocks` wrote, to be put into the expanded model in `files`
    with the new layers `layers`. Raises UserError unless it holds exactly their tensors."""
    blocks = CheckpointFiles(path.parent, only=path.name)
    metadata = read_header(path)[0].get("__metadata__") or {}
    held = metadata.get(NEW_LAYERS)
    if held is None:
        raise UserError(f"{path}: not a file of new blocks, as `--llama_pro_save blocks` leaves them")
    if held != json.dumps(layers):
        raise UserError(f"{path}: has the new layers {held}, but {files.folder} has {layers}")
    wanted = {name for name in files.tensors if family.place(name)[0] in layers}
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
