"""The packed weights of a model, left in a folder by one run and loaded by later ones: --quantized_cache.

`manifest.json` and `packed-<rank>-<number>.safetensors`, in which `<tensor>.codes` and `<tensor>.scales` are bytes.
The manifest names the model by a digest of the weights that were packed, the quantizer, and for every file its
size, for every tensor its CRC-32. It is made in `<folder>.<random>.partial`, which gets its name when whole.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from config import UserError
from limits import INDEX_FILE, read_json
from model_files import CheckpointFiles
from quantizers import PackedWeight, Quantizer, flat_bytes
from tensor_files import UMASK, list_tensors, read_tensor, save_tensors

MANIFEST, VERSION = "manifest.json", 1
FILE_BYTES = 2**30  # of codes that a rank collects in host memory before it writes them
ABANDONED_SECONDS = 24 * 3600  # a folder not touched for so long belongs to a run that was cut


@dataclass(frozen=True)
class CachedWeight:
    """A weight in the cache."""

    name: str
    file: Path
    crc: int
    quantizer: Quantizer

    def read(self) -> PackedWeight:
        """Raises UserError if the bytes are not those that were written."""
        try:
            held = list_tensors(self.file)
            parts = [held[f"{self.name}.{part}"] for part in ("codes", "scales")]
            packed = PackedWeight(*(read_tensor(self.file.parent, part) for part in parts))
        except OSError as e:
            raise UserError(f"--quantized_cache: {self.file} cannot be read ({e.strerror or e})") from None
        except (SafetensorError, LookupError, TypeError) as e:
            raise UserError(f"--quantized_cache: {self.file} is damaged ({e}); delete the folder") from None
        if crc(packed) != self.crc:
            raise UserError(f"--quantized_cache: {self.file} is damaged ({self.name}); delete the folder")
        return packed


def crc(packed: PackedWeight) -> int:
    """CRC-32 of the codes' bytes and then the scales'."""
    return zlib.crc32(packed.scales.numpy(), zlib.crc32(packed.codes.numpy()))


def digest(files: CheckpointFiles, names: list[str]) -> str:
    """Names a model by what was packed: of every weight its name, shape, dtype, and its first, middle and last
    row."""
    total = hashlib.sha256()
    for name in sorted(names):
        stored = files.tensors[name]
        total.update(f"{name} {stored.shape} {stored.dtype}".encode())
        row = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        for i in sorted({0, stored.shape[0] // 2, stored.shape[0] - 1}):
            part = dataclasses.replace(stored, shape=(1, *stored.shape[1:]), begin=stored.begin + i * row)
            total.update(flat_bytes(read_tensor(files.folder, part)).numpy())
    return total.hexdigest()


def open_cache(
    folder: Path, files: CheckpointFiles, names: list[str], quantizer: Quantizer
) -> dict[str, CachedWeight] | None:
    """The packed weights of `names`; None if there is no cache yet. Raises UserError if the folder holds
    something else: another model's or other settings' weights, half a cache, no cache at all."""
    where = f"--quantized_cache {folder}"
    if not os.path.exists(folder) or (folder.is_dir() and not any(folder.iterdir())):  # of any length
        return None
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{where}: holds something else, or half a cache (no {MANIFEST}); choose another folder"
        )
    try:
        manifest = read_json(folder / MANIFEST, INDEX_FILE)
        version, tensors = manifest["version"], manifest["tensors"]
        sizes = dict(manifest["files"].items())
        entries = {n: CachedWeight(n, folder / t["file"], t["crc"], quantizer) for n, t in tensors.items()}
        assert all(t["file"] in sizes for t in tensors.values())
        described = manifest["quantizer"], manifest["model"]
    except (UserError, LookupError, TypeError, AttributeError, AssertionError):
        raise UserError(f"{where}: {MANIFEST} is damaged; delete the folder") from None
    if version != VERSION:
        raise UserError(f"{where}: made by another version; delete the folder")
    if described[0] != repr(quantizer):
        raise UserError(f"{where}: packed by {described[0]}, not {quantizer!r}; choose another folder")
    if entries.keys() != set(names) or described[1] != digest(files, names):
        raise UserError(f"{where}: holds the packed weights of another model; choose another folder")
    for file, size in sizes.items():
        if not os.path.isfile(folder / file) or os.path.getsize(folder / file) != size:  # of any text
            raise UserError(f"{where}: {file} is missing or cut; delete the folder")
    return entries


class CacheWriter:
    """Collects what this rank packs and writes it. Every rank has one; those of the first node write. Several runs
    may make the same cache at once: each has a folder of its own until one of them is whole."""

    def __init__(self, folder: Path, model: str, quantizer: Quantizer, rank: int, writes: bool):
        self.folder, self.rank, self.writes = folder, rank, writes
        self.head = {"version": VERSION, "model": model, "quantizer": repr(quantizer)}
        self.partial: Path | None = None
        self.waiting: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, dict] = {}
        self.files: dict[str, int] = {}

    def start(self) -> None:
        """Collective: makes the folder to write in, and removes what runs that were cut have left."""
        box = [None]
        if self.rank == 0:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            for left in self.folder.parent.glob(f"{glob.escape(self.folder.name)}.*.partial"):
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
            box[0] = tempfile.mkdtemp(".partial", f"{self.folder.name}.", self.folder.parent)
            Path(box[0]).chmod(0o777 & ~UMASK)  # mkdtemp's folders are for one user only
        dist.broadcast_object_list(box, src=0)
        self.partial = Path(box[0])

    def add(self, name: str, packed: PackedWeight) -> None:
        """Takes the packed weight of the checkpoint's tensor `name`."""
        if not self.writes:
            return
        packed = packed.to(torch.device("cpu"))
        self.waiting |= {f"{name}.codes": packed.codes, f"{name}.scales": packed.scales}
        self.tensors[name] = {"file": self._file(), "crc": crc(packed)}
        if sum(t.nbytes for t in self.waiting.values()) >= FILE_BYTES:
            self._flush()

    def _file(self) -> str:
        return f"packed-{self.rank}-{len(self.files)}.safetensors"

    def _flush(self) -> None:
        if self.waiting:
            file = self._file()
            save_tensors(self.waiting, self.partial / file)
            self.files[file] = (self.partial / file).stat().st_size
            self.waiting = {}

    def finish(self) -> None:
        """Collective: the folder gets its manifest and its name."""
        self._flush()
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (self.files, self.tensors))
        if self.rank == 0:
            files = {file: size for files, _ in ranks for file, size in files.items()}
            tensors = {name: entry for _, tensors in ranks for name, entry in tensors.items()}
            manifest = self.head | {"files": files, "tensors": tensors}
            (self.partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            try:
                self.partial.rename(self.folder)  # also over an empty folder
            except OSError as e:
                if not (self.folder / MANIFEST).is_file():  # else another run was first; its cache is as good
                    print(f"--quantized_cache {self.folder}: could not be put in place ({e.strerror})")
                shutil.rmtree(self.partial, ignore_errors=True)
        dist.barrier()
