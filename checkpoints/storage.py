"""The files of a checkpoint, and how torch.distributed.checkpoint writes and reads them.

    RUN/checkpoints/step-00000120/rank-00000.safetensors ...   each rank's shards
                                  manifest.json                which part of which tensor lies where; the state of the
                                                               run; size and SHA-256 of every file

A checkpoint exists whole or not at all: everything is written and synced under `step-<number>.tmp`, which gets its
name last; a manifest that does not match its files makes it no checkpoint, and the one before it is used. Not the
storage of torch's own, whose metadata is a pickle: nothing here is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import operator
import os
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from files.atomic_writes import make_staging_folder, remove_folder, staging_path
from files.disk_room import check_free_space
from files.names import METRICS
from files.tensors import writev_tensors
from launch.memory import MIB
from options.config import CHECKPOINTS
from options.errors import UserError
from options.limits import MAX_MANIFEST_BYTES, check_size, read_text

MANIFEST, VERSION, RANK = "manifest.json", 2, "rank-"
# Of a RUN, appended to; a resumed run cuts them to the checkpoint. One that was not there then had no lines.
GROWING_FILES = (METRICS, "samples.jsonl", "bad_steps.jsonl")
NAME = re.compile(r"step-(\d{8,})")
FILE = re.compile(rf"{RANK}\d{{5,}}\.safetensors", re.ASCII)
DIGESTED = 32 * MIB  # bytes of a file at a time
HEADER = 100_000_000  # bytes of a header, the most that safetensors reads
SPARE = MIB  # bytes of the disk that a checkpoint leaves free, for the lines of metrics.jsonl that follow


class Damaged(Exception):
    """Why a folder holds no whole checkpoint."""


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint. step: optimizer steps that were done; run: what the run said of itself; tensors: {name:
    {"dtype", "shape", "chunks": [[offsets, sizes, file], ...]}}."""

    folder: Path
    step: int
    run: dict
    tensors: dict[str, dict]


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint."""

    name: str
    size: int
    sha256: str


def folder_of(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:08d}"


def steps_in(run: Path) -> list[int]:
    """The steps that have a checkpoint, whole or damaged, the last one first."""
    names = (NAME.fullmatch(p.name) for p in (run / CHECKPOINTS).glob("step-*"))
    return sorted((int(m[1]) for m in names if m), reverse=True)


def read_checkpoint(folder: Path) -> Saved:
    """Raises Damaged unless every file is there, of the size and with the contents that the manifest says. Raises
    UserError where that cannot be told, or by another version of this program only: what may be whole is not passed
    over, as the run would go back and remove it."""
    for path in (folder, folder / MANIFEST):
        if path.is_symlink():
            raise UserError(f"{path}: is a link; a checkpoint is a folder of files of its own")
    try:
        check_size(folder / MANIFEST, MAX_MANIFEST_BYTES)
        manifest = json.loads(read_text(folder / MANIFEST, MAX_MANIFEST_BYTES))
        if manifest["version"] != VERSION:
            raise UserError(f"{folder}: made by another version of this program, which can go on with it")
        if manifest.pop("sha256") != _digest(_text(manifest)):
            raise Damaged(f"{MANIFEST} was changed")
        files = [Written(**entry) for entry in manifest["files"]]
        saved = Saved(folder, manifest["step"], manifest["run"], manifest["tensors"])
        named = {file for t in saved.tensors.values() for _, _, file in t["chunks"]}
        if named != {f.name for f in files} or not all(map(FILE.fullmatch, named)):
            raise Damaged(f"{MANIFEST} names other files than those of the checkpoint")
        if not all(isinstance(dtype_of(t), torch.dtype) for t in saved.tensors.values()):
            raise Damaged(f"{MANIFEST} has an unknown dtype")
        if type(saved.step) is not int or saved.step < 1 or not isinstance(saved.run, dict):
            raise Damaged(f"{MANIFEST} has no step")
        if NAME.fullmatch(folder.name) and folder.name != folder_of(folder, saved.step).name:
            raise Damaged(f"{MANIFEST} is of step {saved.step}")
        held = {f.name: _tensors_of(saved, f.name) for f in files}
    except OSError as e:
        raise _not_there(folder / MANIFEST, e) from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise Damaged(f"{MANIFEST} is damaged") from None
    for file in files:
        path = folder / file.name
        try:
            whole = path.stat().st_size == file.size and _measure(_regular(path, held[file.name])) == file
        except OSError as e:
            raise _not_there(path, e) from None
        if not whole:
            raise Damaged(f"{file.name} is not as it was written")
        _check_tensors(path, held[file.name])
    return saved


def _tensors_of(saved: Saved, file: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """{name: (dtype, shape)} of what the manifest says of a file."""
    return {
        name: (dtype_of(stored), tuple(map(operator.index, sizes)))
        for name, stored in saved.tensors.items()
        for _, sizes, where in stored["chunks"]
        if where == file
    }


def _regular(path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> Path:
    """The path of a file that may be read to its end. Raises UserError."""
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path}: is a link, or no file; a checkpoint is a folder of files of its own")
    if path.stat().st_size > HEADER + sum(
        math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values()
    ):
        raise UserError(f"{path}: is larger than the tensors that it should hold")
    return path


def _check_tensors(path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Raises UserError if a file holds other tensors than the manifest says. Their numbers are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in tensors.keys() & set(file.keys()):
                tensor = file.get_tensor(name)
                if (tensor.dtype, tuple(tensor.shape)) != tensors[name]:
                    raise UserError(f"{path}: cannot be loaded ({name} is another one than {MANIFEST} says)")
    except SafetensorError as e:
        raise UserError(f"{path}: cannot be loaded ({e})") from None


def _not_there(path: Path, error: OSError) -> Exception:
    """Only what is not there is damage for certain: a disk or a network may come back."""
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return (Damaged if missing else UserError)(f"{path.name if missing else path}: {error.strerror}")


def newest_whole(run: Path, tell: Callable[[str], None]) -> Saved | None:
    """The last whole checkpoint of a RUN. tell: is told which newer ones are damaged. Raises UserError."""
    for step in steps_in(run):
        try:
            return read_checkpoint(folder_of(run, step))
        except Damaged as e:
            tell(f"{folder_of(run, step)}: no whole checkpoint ({e}); the one before it is used")
    return None


def remove_checkpoints(run: Path, after: int) -> None:
    """Removes what a run that was cut has left, and the checkpoints of steps beyond `after`. Raises OSError."""
    for left in (run / CHECKPOINTS).glob("step-*.tmp"):
        remove_folder(left)
    for step in steps_in(run):
        if step > after:
            _remove(folder_of(run, step), ignore_errors=False)


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints. One that resists stays, and is tried again the next time."""
    for step in steps_in(run)[keep:]:
        _remove(folder_of(run, step), ignore_errors=True)


def _remove(folder: Path, ignore_errors: bool) -> None:
    """The manifest first: what a cut leaves of the folder is no checkpoint."""
    if not folder.is_symlink():
        with contextlib.suppress(OSError):
            (folder / MANIFEST).unlink()
    remove_folder(folder, ignore_errors)


def _text(manifest: dict) -> str:
    return json.dumps(manifest, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _measure(path: Path) -> Written:
    # Not by file_digest, which comes back to Python each 256 KiB.
    digest, piece = hashlib.sha256(), bytearray(DIGESTED)
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(piece):
            digest.update(memoryview(piece)[:n])
        return Written(path.name, os.fstat(file.fileno()).st_size, digest.hexdigest())


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_of(rank: int) -> str:
    return f"{RANK}{rank:05d}.safetensors"


class Writer(StorageWriter):
    """Writes one checkpoint, by the plans of checkpoints/planner.py. run: what its manifest is to say of the run, asked of the
    first rank only.

    Raises OSError, which torch.distributed.checkpoint makes a CheckpointException on every rank; the folder under
    its temporary name is then the caller's to remove.
    """

    def __init__(self, folder: Path, step: int, run: Callable[[], dict]):
        self.folder, self.step, self.run = folder, step, run
        self.temporary = staging_path(folder)

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False  # none of those that torch could choose by itself

    def set_up_storage_writer(self, is_coordinator: bool) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Makes the folder, if the disk has room for all ranks."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        check_free_space(self.folder.parent, SPARE + sum(plan.planner_data.nbytes for plan in plans))
        make_staging_folder(self.folder)
        return [dataclasses.replace(plan, storage_data=file_of(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        results = []
        if plan.items:
            path = self.temporary / plan.storage_data
            tensors: dict[str, Any] = {i.index.fqn: planner.resolve_data(i) for i in plan.items}
            writev_tensors(tensors, path)
            sync(path)
            written = _measure(path)
            results = [WriteResult(MetadataIndex(written.name), written.size, written)]
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written."""
        files = [result.storage_data for rank in results for result in rank]
        for file in files:
            path = self.temporary / file.name
            if not path.is_file() or path.stat().st_size != file.size:
                raise OSError(
                    errno.ENOENT, "a rank's file is not seen here: all nodes must share --output_dir"
                )
        tensors = {
            name: stored | {"chunks": [[*where, file_of(rank)] for *where, rank in stored["chunks"]]}
            for name, stored in metadata.planner_data.items()
        }
        metadata.planner_data = None  # torch sends it to all ranks afterwards, which need none of it
        run = json.loads(json.dumps(self.run()))  # as it will be read
        manifest = {"version": VERSION, "step": self.step, "run": run, "tensors": tensors}
        manifest["files"] = [dataclasses.asdict(f) for f in files]
        path, text = self.temporary / MANIFEST, _text(manifest)  # once: it holds the interpreter
        text = f'{text[:-1]}, "sha256": "{_digest(text)}"}}\n'
        if len(text) > MAX_MANIFEST_BYTES:
            raise OSError(errno.EFBIG, f"its {MANIFEST} would be too large to be read")
        path.write_text(text, encoding="utf-8")
        sync(path)
        sync(self.temporary)
        self.temporary.rename(self.folder)
        sync(self.folder.parent)
        sync(self.folder.parent.parent)  # the first checkpoint made the folder of all


class Reader(StorageReader):
    """Reads a checkpoint, each rank only what it needs of it, on any number of ranks."""

    def __init__(self, saved: Saved):
        self.saved = saved

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False

    def read_metadata(self) -> Metadata:
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        places: dict[MetadataIndex, str] = {}
        for name, stored in self.saved.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s, _ in stored["chunks"]]
            properties = TensorProperties(dtype=dtype_of(stored))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(stored["shape"]), chunks)
            places |= {MetadataIndex(name, offsets): file for offsets, _, file in stored["chunks"]}
        return Metadata(tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self.places[item.storage_index]].append(item)
        for name, items in by_file.items():
            with safe_open(self.saved.folder / name, framework="pt") as file:
                for item in items:
                    spans = zip(item.storage_offsets, item.lengths, strict=True)
                    part = tuple(slice(start, start + length) for start, length in spans)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(file.get_tensor(item.storage_index.fqn)[part])
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def rank_of(file: str) -> int:
    """Of the rank that wrote a file of a checkpoint."""
    return int(file.removeprefix(RANK).partition(".")[0])


def dtype_of(stored: dict) -> torch.dtype:
    """Of an entry of Saved.tensors."""
    return getattr(torch, stored["dtype"])
