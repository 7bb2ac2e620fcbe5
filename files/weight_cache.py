"""The packed weights of a model, left in a folder by one run and loaded by later ones: --quantized_cache.

`manifest.json` and `packed-<rank>-<number>.safetensors`, in which `<tensor>.codes` and `<tensor>.scales` are
bytes. The manifest names the model by a digest of the weights that were packed, what packed them, and for
every file its size, for every tensor its CRC-32. It is made in `<folder>.<random>.partial`, which gets its
name when whole.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from files.digests import digest_rows_of
from files.disk_room import check_room, check_writable
from files.model_folder import CheckpointFiles
from files.tensors import UMASK, list_tensors, read_tensor, save_tensors
from launch.ranks import RankInfo
from options.errors import UserError, describe
from options.limits import MAX_INDEX_BYTES, read_json
from quantization.quantizers import PackedWeight, Quantizer

MANIFEST, VERSION = "manifest.json", 2
FILE = re.compile(r"packed-\d{1,6}-\d{1,6}\.safetensors", re.ASCII)
FILE_BYTES = 2**30  # of codes that a rank collects in host memory before it writes them
ABANDONED_SECONDS = 24 * 3600  # a folder not touched for so long belongs to a run that was cut
# Rows that are drawn of a weight, and about how many of all weights: a model of many experts has tens of
# thousands.
DRAWN, DRAWN_OF_ALL = 16, 10_000


@dataclass(frozen=True)
class CachedWeight:
    """A weight in the cache. shape: [O, I], of what was packed."""

    name: str
    file: Path
    crc: int
    quantizer: Quantizer
    shape: tuple[int, ...]

    def read(self) -> PackedWeight:
        """Raises UserError if the bytes are not those that were written."""
        try:
            held = list_tensors(self.file)
            parts = [held[f"{self.name}.{part}"] for part in ("codes", "scales")]
            sizes = [(torch.uint8, (n_bytes,)) for n_bytes in self.quantizer.sizes(self.shape)]
            assert [(part.dtype, part.shape) for part in parts] == sizes, (
                f"{self.name}: another dtype or size"
            )
            packed = PackedWeight(*(read_tensor(self.file.parent, part) for part in parts))
            assert crc(packed) == self.crc, self.name
        except OSError as e:
            raise UserError(f"--quantized_cache: {self.file} cannot be read ({e.strerror or e})") from None
        except (SafetensorError, LookupError, AssertionError) as e:
            raise UserError(f"--quantized_cache: {self.file} is damaged ({e}); delete the folder") from None
        return packed


def crc(packed: PackedWeight) -> int:
    """CRC-32 of the codes' bytes and then the scales'."""
    return zlib.crc32(packed.scales.numpy().data, zlib.crc32(packed.codes.numpy().data))


def digest_packed(files: CheckpointFiles, names: list[str]) -> str:
    """Digest of the weights that a cache holds packed."""
    return digest_rows_of(files, names, max(1, min(DRAWN, DRAWN_OF_ALL // len(names))))


def packers(quantizer: Quantizer, device_type: str) -> dict[str, str]:
    """What must be the same, beside the weights, for the same codes. HQQ computes in fp16 on a GPU only, and
    bitsandbytes rounds ties of NF4's scales in another way there."""
    library = quantizer.library
    return {
        "quantizer": repr(quantizer),
        "library": f"{library} {importlib.metadata.version(library)}",
        "device": "a CPU" if device_type == "cpu" else "a GPU",
    }


def open_cache(
    folder: Path, files: CheckpointFiles, names: list[str], quantizer: Quantizer, device_type: str
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
        manifest = read_json(folder / MANIFEST, MAX_INDEX_BYTES)
        same_version = manifest["version"] == VERSION
        assert not same_version or _is_sound(manifest)
    except (UserError, LookupError, TypeError, AttributeError, AssertionError):
        raise UserError(f"{where}: {MANIFEST} is damaged; delete the folder") from None
    if not same_version:
        raise UserError(f"{where}: made by another version; delete the folder")
    for name, ours in packers(quantizer, device_type).items():
        if manifest[name] != ours:
            raise UserError(f"{where}: packed by {manifest[name]}, not {ours}; choose another folder")
    tensors = manifest["tensors"]
    if tensors.keys() != set(names) or manifest["model"] != digest_packed(files, names):
        raise UserError(f"{where}: holds the packed weights of another model; choose another folder")
    for file, size in manifest["files"].items():
        if not os.path.isfile(folder / file) or os.path.getsize(folder / file) != size:
            raise UserError(f"{where}: {file} is missing or cut; delete the folder")
    return {
        name: CachedWeight(name, folder / t["file"], t["crc"], quantizer, files.tensors[name].shape)
        for name, t in tensors.items()
    }


def _is_sound(manifest: dict) -> bool:
    """Whether it has the form of ours, and names no file that we would not write."""
    files, tensors = manifest["files"], manifest["tensors"].values()
    return (
        all(manifest[name].isprintable() for name in ("model", "quantizer", "library", "device"))
        and all(FILE.fullmatch(file) and type(size) is int for file, size in files.items())
        and all(t["file"] in files and type(t["crc"]) is int for t in tensors)
    )


@dataclass(frozen=True)
class NewCache:
    """A cache that is still to be written. head: what the manifest says of the weights and what packs them;
    n_bytes: of all codes and scales."""

    folder: Path
    head: dict
    n_bytes: int


def new_cache(
    folder: Path,
    files: CheckpointFiles,
    names: list[str],
    quantizer: Quantizer,
    device_type: str,
    output_dir: str,
) -> NewCache:
    """Raises UserError if it could not be put there, or if another folder in its place were in the run's
    way."""
    check_writable(folder, "--quantized_cache")
    folder = Path(os.path.realpath(folder))  # a folder cannot take the place of a link
    if os.path.ismount(folder):
        raise UserError(f"--quantized_cache {folder}: is a mount point; choose a folder in it")
    for taken, what in (os.curdir, "the current folder"), (output_dir, f"--output_dir {output_dir}"):
        if Path(os.path.realpath(taken)).is_relative_to(folder):
            raise UserError(f"--quantized_cache {folder}: is {what}, or above it; choose a folder of its own")
    check_writable(folder.parent, "--quantized_cache")  # where it is made
    head = {"version": VERSION, "model": digest_packed(files, names)} | packers(quantizer, device_type)
    sizes = (sum(quantizer.sizes(files.tensors[name].shape)) for name in names)
    return NewCache(folder, head, sum(sizes))


@contextlib.contextmanager
def writing(cache: NewCache | None, rank_info: RankInfo) -> Iterator[CacheWriter | None]:
    """Around a load: gives what takes the packed weights, if they are to be cached. Collective. The run is as
    good without the cache: what cannot be written is told in a line. After an error of the load nothing is
    left."""
    if cache is None:
        yield None
        return
    writer = CacheWriter(cache, rank_info.rank, rank_info.rank < rank_info.local_world)
    writer.start()
    with contextlib.ExitStack() as unless_loaded:
        unless_loaded.callback(writer.remove)
        yield writer
        unless_loaded.pop_all()
    writer.finish()


class CacheWriter:
    """Collects what this rank packs and writes it. Every rank has one; those of the first node write. Several
    runs may make the same cache at once: each has a folder of its own until one of them is whole."""

    def __init__(self, cache: NewCache, rank: int, writes: bool):
        self.cache, self.folder, self.rank, self.writes = cache, cache.folder, rank, writes
        self.partial: Path | None = None  # None: there will be no cache
        self.failure: OSError | None = None
        self.waiting: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, dict] = {}
        self.files: dict[str, int] = {}

    def start(self) -> None:
        """Collective: makes the folder to write in, and removes what runs that were cut have left."""
        box: list[Path | None] = [None]
        if self.rank == 0:
            try:
                self._make_folder()
                box = [self.partial]
            except OSError as e:
                self._tell(e)
                self.remove()
        dist.broadcast_object_list(box, src=0)
        self.partial = box[0]

    def _make_folder(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for left in self._partials():
            with contextlib.suppress(FileNotFoundError):  # another run removes it as well
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        check_room(self.folder.parent, self.cache.n_bytes)
        self.partial = Path(tempfile.mkdtemp(".partial", f"{self.folder.name}.", self.folder.parent))
        self.partial.chmod(0o777 & ~UMASK)  # mkdtemp's folders are for one user only

    def _partials(self) -> list[Path]:
        """Of all runs that make this cache."""
        return list(self.folder.parent.glob(f"{glob.escape(self.folder.name)}.*.partial"))

    def add(self, name: str, packed: PackedWeight) -> None:
        """Takes the packed weight of the checkpoint's tensor `name`."""
        if not self.writes or self.partial is None or self.failure:
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
            assert self.partial is not None
            file = self._file()
            try:
                save_tensors(self.waiting, self.partial / file)
                self.files[file] = (self.partial / file).stat().st_size
            except OSError as e:
                self.failure = e
                self.remove()  # now: the room is for others. Other ranks can write no more either, and stop.
            self.waiting = {}

    def finish(self) -> None:
        """Collective: the folder gets its manifest and its name, unless a rank failed."""
        if self.partial is None:
            return
        self._flush()
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (self.files, self.tensors, self.failure))
        if self.rank == 0:
            try:
                self._put_in_place(ranks)
            except OSError as e:
                # If there is one, another run was first: its cache is as good.
                if not os.path.isfile(self.folder / MANIFEST):
                    self._tell(e)
                self.remove()
            else:
                for left in self._partials():  # nobody needs them any more
                    shutil.rmtree(left, ignore_errors=True)
        dist.barrier()

    def _put_in_place(self, ranks: list[tuple[dict, dict, OSError | None]]) -> None:
        """Raises OSError, also that of another rank."""
        failures = [failure for _, _, failure in ranks if failure]
        if failures:  # but for what only follows from another rank's: that the folder is gone
            raise min(failures, key=lambda e: e.errno == errno.ENOENT)
        files = {file: size for files, _, _ in ranks for file, size in files.items()}
        tensors = {name: entry for _, tensors, _ in ranks for name, entry in tensors.items()}
        manifest = self.cache.head | {"files": files, "tensors": tensors}
        assert self.partial is not None
        (self.partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        self.partial.rename(self.folder)  # also over an empty folder

    def remove(self) -> None:
        """Removes what has been written."""
        if self.partial:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _tell(self, e: OSError) -> None:
        told = f"WARNING: --quantized_cache {self.folder}: could not be written ({describe(e)}); the run goes on without it"
        print(told, file=sys.stderr, flush=True)
