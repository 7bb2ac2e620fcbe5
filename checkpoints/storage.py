"""The files of a checkpoint, and how torch.distributed.checkpoint writes and reads them.

    RUN/checkpoints/step-00000120/
        rank-00000.safetensors ...   each rank's shards
        manifest.json                which file has which chunk of a tensor; the run's state; size and SHA-256
                                     of every file

A checkpoint exists completely or not at all. Everything is written and synced in `step-<number>.tmp`, which
is renamed last. If a manifest does not match its files, the folder is no checkpoint, and the previous one is
used. torch's own storage is not used: its metadata is a pickle, and nothing here is unpickled.
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

MANIFEST, VERSION, RANK_PREFIX = "manifest.json", 2, "rank-"
# Files of a RUN that only grow. A resumed run cuts them to their length at the checkpoint; a missing file had
# length 0.
GROWING_FILES = (METRICS, "samples.jsonl", "bad_steps.jsonl")
FOLDER_NAME = re.compile(r"step-(\d{8,})")
FILE_NAME = re.compile(rf"{RANK_PREFIX}\d{{5,}}\.safetensors", re.ASCII)
DIGEST_CHUNK_BYTES = 32 * MIB
MAX_HEADER_BYTES = 100_000_000  # the largest header that safetensors reads
SPARE_BYTES = MIB  # disk space that a checkpoint leaves free, for the next lines of metrics.jsonl

# {name: (dtype, shape)} of the tensors in a file
TensorSpecs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class DamagedCheckpoint(Exception):
    """A folder holds no complete checkpoint; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: Its folder.
        step: Optimizer steps that were completed.
        run: What the run wrote about itself: see RUN_STATE_FORM in checkpoints/same_run.py.
        tensors: {name: {"dtype", "shape", "chunks": [[offsets, sizes, file], ...]}}.
    """

    folder: Path
    step: int
    run: dict
    tensors: dict[str, dict]


@dataclass(frozen=True)
class WrittenFile:
    """The manifest's entry of a file."""

    name: str
    size: int
    sha256: str


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after this step, whether it exists or not."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of a RUN's checkpoints, complete or damaged, in descending order."""
    names = (FOLDER_NAME.fullmatch(p.name) for p in (run / CHECKPOINTS).glob("step-*"))
    return sorted((int(m[1]) for m in names if m), reverse=True)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return what a checkpoint's manifest says, after verifying all files by size, SHA-256 and header.

    Raises DamagedCheckpoint unless all files have the size and the contents that the manifest says. Raises
    UserError if that cannot be decided, or only by another version of this program: a checkpoint that may be
    complete must not be skipped, because the run would go back and delete it.
    """
    for path in (folder, folder / MANIFEST):
        if path.is_symlink():
            raise UserError(f"{path}: is a symbolic link; only regular files and folders are used")
    try:
        check_size(folder / MANIFEST, MAX_MANIFEST_BYTES)
        manifest = json.loads(read_text(folder / MANIFEST, MAX_MANIFEST_BYTES))
        if manifest["version"] != VERSION:
            raise UserError(f"{folder}: made by another version of this program; resume it with that version")
        if manifest.pop("sha256") != _digest(_text(manifest)):
            raise DamagedCheckpoint(f"{MANIFEST} was changed")
        files = [WrittenFile(**entry) for entry in manifest["files"]]
        checkpoint = Checkpoint(folder, manifest["step"], manifest["run"], manifest["tensors"])
        named = {file for t in checkpoint.tensors.values() for _, _, file in t["chunks"]}
        if named != {f.name for f in files} or not all(map(FILE_NAME.fullmatch, named)):
            raise DamagedCheckpoint(f"{MANIFEST} names other files than those of the checkpoint")
        if not all(isinstance(stored_dtype(t), torch.dtype) for t in checkpoint.tensors.values()):
            raise DamagedCheckpoint(f"{MANIFEST} has an unknown dtype")
        step = checkpoint.step
        if type(step) is not int or step < 1 or not isinstance(checkpoint.run, dict):
            raise DamagedCheckpoint(f"{MANIFEST} has no step")
        if FOLDER_NAME.fullmatch(folder.name) and folder.name != checkpoint_folder(folder, step).name:
            raise DamagedCheckpoint(f"{MANIFEST} is of step {step}")
        specs = {f.name: _tensor_specs(checkpoint, f.name) for f in files}
    except OSError as e:
        raise _read_error(folder / MANIFEST, e) from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise DamagedCheckpoint(f"{MANIFEST} is damaged") from None
    for file in files:
        path = folder / file.name
        changed = DamagedCheckpoint(f"{file.name} does not match its size or checksum in the manifest")
        try:
            if path.stat().st_size != file.size:
                raise changed
            _check_regular_file(path, specs[file.name])
            if _measure(path) != file:
                raise changed
        except OSError as e:
            raise _read_error(path, e) from None
        _check_tensors(path, specs[file.name])
    return checkpoint


def _tensor_specs(checkpoint: Checkpoint, file: str) -> TensorSpecs:
    """Return {name: (dtype, shape of the chunk)} of the tensors that the manifest says are in a file."""
    return {
        name: (stored_dtype(entry), tuple(map(operator.index, sizes)))
        for name, entry in checkpoint.tensors.items()
        for _, sizes, chunk_file in entry["chunks"]
        if chunk_file == file
    }


def _check_regular_file(path: Path, specs: TensorSpecs) -> None:
    """Raise UserError unless a file is regular, and no larger than its header and tensors may be."""
    if path.is_symlink() or not path.is_file():
        raise UserError(
            f"{path}: is a symbolic link, or no regular file; only regular files and folders are used"
        )
    nbytes = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
    if path.stat().st_size > MAX_HEADER_BYTES + nbytes:
        raise UserError(f"{path}: is larger than the tensors that it should hold")


def _check_tensors(path: Path, specs: TensorSpecs) -> None:
    """Raise UserError if a file is unreadable, or a tensor in it has another dtype or shape than in `specs`.

    Values are not read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in specs.keys() & set(file.keys()):
                tensor = file.get_tensor(name)
                if (tensor.dtype, tuple(tensor.shape)) != specs[name]:
                    raise UserError(f"{path}: cannot be loaded ({name} is another one than {MANIFEST} says)")
    except SafetensorError as e:
        raise UserError(f"{path}: cannot be loaded ({e})") from None


def _read_error(path: Path, error: OSError) -> Exception:
    """Return the exception to raise for an OSError: DamagedCheckpoint if `path` is missing, else UserError.

    After other errors a disk or a network may come back.
    """
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return (DamagedCheckpoint if missing else UserError)(
        f"{path.name if missing else path}: {error.strerror}"
    )


def find_newest_checkpoint(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest complete checkpoint of a RUN, or None. Raises UserError like `read_checkpoint`.

    warn: Receives a line for each newer checkpoint that is damaged.
    """
    for step in checkpoint_steps(run):
        try:
            return read_checkpoint(checkpoint_folder(run, step))
        except DamagedCheckpoint as e:
            warn(f"{checkpoint_folder(run, step)}: no complete checkpoint ({e}); the one before it is used")
    return None


def remove_checkpoints(run: Path, after: int) -> None:
    """Remove the checkpoints of steps beyond `after`, and unfinished ones. Raises OSError."""
    for unfinished in (run / CHECKPOINTS).glob("step-*.tmp"):
        remove_folder(unfinished)
    for step in checkpoint_steps(run):
        if step > after:
            _remove(checkpoint_folder(run, step), ignore_errors=False)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints. What cannot be removed is tried again the next time."""
    for step in checkpoint_steps(run)[keep:]:
        _remove(checkpoint_folder(run, step), ignore_errors=True)


def _remove(folder: Path, ignore_errors: bool) -> None:
    """Remove a checkpoint, its manifest first: an interrupted removal then leaves no checkpoint."""
    if not folder.is_symlink():
        with contextlib.suppress(OSError):
            (folder / MANIFEST).unlink()
    remove_folder(folder, ignore_errors)


def _text(manifest: dict) -> str:
    return json.dumps(manifest, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _measure(path: Path) -> WrittenFile:
    """Return a file's size and SHA-256."""
    # Not file_digest, which returns to Python after every 256 KiB.
    digest, buffer = hashlib.sha256(), bytearray(DIGEST_CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(memoryview(buffer)[:n])
        return WrittenFile(path.name, os.fstat(file.fileno()).st_size, digest.hexdigest())


def sync(path: Path) -> None:
    """Call fsync: wait until a file, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rank_file_name(rank: int) -> str:
    """Return the name of the file that a rank writes in a checkpoint."""
    return f"{RANK_PREFIX}{rank:05d}.safetensors"


class CheckpointWriter(StorageWriter):
    """Writes one checkpoint, by the plans of checkpoints/planner.py.

    Raises OSError, which torch.distributed.checkpoint turns into a CheckpointException on every rank; the
    caller must then remove the staging folder.

    Args:
        folder: The checkpoint's final folder.
        step: Optimizer steps that were completed.
        describe_run: Returns the manifest's `run`; called on rank 0 only.
    """

    def __init__(self, folder: Path, step: int, describe_run: Callable[[], dict]):
        self.folder, self.step, self.describe_run = folder, step, describe_run
        self.staging_folder = staging_path(folder)

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False  # torch must not choose this storage by itself

    def set_up_storage_writer(self, is_coordinator: bool) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the staging folder, and name each rank's file. Raises OSError, also if the disk lacks room."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        check_free_space(self.folder.parent, SPARE_BYTES + sum(plan.planner_data.nbytes for plan in plans))
        make_staging_folder(self.folder)
        return [
            dataclasses.replace(plan, storage_data=rank_file_name(rank)) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and sync this rank's file, unless it has no items. Return a finished future.

        Raises OSError.
        """
        done: Future[list[WriteResult]] = Future()
        results = []
        if plan.items:
            path = self.staging_folder / plan.storage_data
            tensors: dict[str, Any] = {i.index.fqn: planner.resolve_data(i) for i in plan.items}
            writev_tensors(tensors, path)
            sync(path)
            written = _measure(path)
            results = [WriteResult(MetadataIndex(written.name), written.size, written)]
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and give the folder its name: on rank 0, after all ranks have written.

        Raises OSError, also if a rank's file is not seen here or the manifest is too large.
        """
        files = [result.storage_data for rank in results for result in rank]
        for file in files:
            path = self.staging_folder / file.name
            if not path.is_file() or path.stat().st_size != file.size:
                raise OSError(
                    errno.ENOENT, "a rank's file is not seen here: all nodes must share --output_dir"
                )
        tensors = {
            name: entry | {"chunks": [[*range_, rank_file_name(rank)] for *range_, rank in entry["chunks"]]}
            for name, entry in metadata.planner_data.items()
        }
        metadata.planner_data = None  # otherwise torch sends it to all ranks, which do not need it
        run = json.loads(json.dumps(self.describe_run()))  # as it will be read
        manifest = {"version": VERSION, "step": self.step, "run": run, "tensors": tensors}
        manifest["files"] = [dataclasses.asdict(f) for f in files]
        # Dumped only once, because that holds the interpreter.
        path, text = self.staging_folder / MANIFEST, _text(manifest)
        text = f'{text[:-1]}, "sha256": "{_digest(text)}"}}\n'
        if len(text) > MAX_MANIFEST_BYTES:
            raise OSError(errno.EFBIG, f"its {MANIFEST} would be too large to be read")
        path.write_text(text, encoding="utf-8")
        sync(path)
        sync(self.staging_folder)
        self.staging_folder.rename(self.folder)
        sync(self.folder.parent)
        sync(self.folder.parent.parent)  # the first checkpoint makes the parent folder


class CheckpointReader(StorageReader):
    """Reads a checkpoint on any number of ranks, on each only the chunks that it needs."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False

    def read_metadata(self) -> Metadata:
        """Return the manifest's tensors as torch describes them; storage_data is {chunk: file name}."""
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        files: dict[MetadataIndex, str] = {}
        for name, entry in self.checkpoint.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s, _ in entry["chunks"]]
            properties = TensorProperties(dtype=stored_dtype(entry))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
            files |= {MetadataIndex(name, offsets): file for offsets, _, file in entry["chunks"]}
        return Metadata(tensors, storage_data=files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        self.files = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the plan's slices from the files into the planner's tensors. Return a finished future."""
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self.files[item.storage_index]].append(item)
        for name, items in by_file.items():
            with safe_open(self.checkpoint.folder / name, framework="pt") as file:
                for item in items:
                    spans = zip(item.storage_offsets, item.lengths, strict=True)
                    slices = tuple(slice(start, start + length) for start, length in spans)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(file.get_tensor(item.storage_index.fqn)[slices])
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def rank_of_file(file: str) -> int:
    """Return the rank that wrote a file of a checkpoint."""
    return int(file.removeprefix(RANK_PREFIX).partition(".")[0])


def stored_dtype(entry: dict) -> torch.dtype:
    """Return the dtype of an entry of Checkpoint.tensors."""
    return getattr(torch, entry["dtype"])
