"""A cache of a model's packed weights, written by one run and loaded by later ones: --quantized_cache.

The folder holds `manifest.json` and `packed-<rank>-<number>.safetensors`, in which `<tensor>.codes` and
`<tensor>.scales` are bytes. The manifest holds a digest of the weights that were packed, the quantizer,
library and device that packed them, the size of every file and the CRC-32 of every tensor. A cache is written
in `<folder>.<random>.partial` and renamed when complete.
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

from files.digests import digest_weight_rows
from files.disk_room import check_free_space, check_writable
from files.model_folder import CheckpointFiles
from files.tensors import UMASK, list_tensors, read_tensor, save_tensors
from launch.ranks import RankInfo
from options.errors import UserError, describe
from options.limits import MAX_INDEX_BYTES, read_json
from quantization.quantizers import PackedWeight, Quantizer

MANIFEST, VERSION = "manifest.json", 2
FILE_NAME = re.compile(r"packed-\d{1,6}-\d{1,6}\.safetensors", re.ASCII)
FILE_BYTES = 2**30  # bytes that a rank collects in host memory before it writes a file
ABANDONED_SECONDS = 24 * 3600  # a staging folder untouched for longer belongs to an interrupted run
# Extra rows in the digest of each weight; in total about MAX_EXTRA_ROWS, since a model of many experts has
# tens of thousands of weights.
EXTRA_ROWS, MAX_EXTRA_ROWS = 16, 10_000


@dataclass(frozen=True)
class CachedWeight:
    """A weight in the cache. shape: [O, I], that of the dense weight."""

    name: str
    file: Path
    crc: int
    quantizer: Quantizer
    shape: tuple[int, ...]

    def read(self) -> PackedWeight:
        """Return the codes and scales. Raises UserError if the file is unreadable or damaged."""
        try:
            tensors = list_tensors(self.file)
            codes_and_scales = [tensors[f"{self.name}.{kind}"] for kind in ("codes", "scales")]
            expected = [(torch.uint8, (n_bytes,)) for n_bytes in self.quantizer.packed_sizes(self.shape)]
            found = [(stored.dtype, stored.shape) for stored in codes_and_scales]
            assert found == expected, f"{self.name}: another dtype or size"
            packed = PackedWeight(*(read_tensor(self.file.parent, stored) for stored in codes_and_scales))
            assert compute_crc(packed) == self.crc, self.name
        except OSError as e:
            raise UserError(f"--quantized_cache: {self.file} cannot be read ({e.strerror or e})") from None
        except (SafetensorError, LookupError, AssertionError) as e:
            raise UserError(f"--quantized_cache: {self.file} is damaged ({e}); delete the folder") from None
        return packed


def compute_crc(packed: PackedWeight) -> int:
    """Return the CRC-32 of the codes' bytes followed by the scales'."""
    return zlib.crc32(packed.scales.numpy().data, zlib.crc32(packed.codes.numpy().data))


def digest_dense_weights(files: CheckpointFiles, names: list[str]) -> str:
    """Return the digest of the dense weights `names`, of which a cache holds packed ones. Raises OSError."""
    return digest_weight_rows(files, names, max(1, min(EXTRA_ROWS, MAX_EXTRA_ROWS // len(names))))


def describe_packer(quantizer: Quantizer, device_type: str) -> dict[str, str]:
    """Return the manifest's entries on the quantizer, its library and device, which decide the codes.

    The kind of device matters: HQQ computes in fp16 on a GPU only, and bitsandbytes rounds ties of NF4's
    scales differently there.
    """
    library = quantizer.library
    return {
        "quantizer": repr(quantizer),
        "library": f"{library} {importlib.metadata.version(library)}",
        "device": "a CPU" if device_type == "cpu" else "a GPU",
    }


def open_cache(
    folder: Path,
    files: CheckpointFiles,
    names: list[str],
    quantizer: Quantizer,
    device_type: str,
    vision_parts: tuple[str, ...] = (),
) -> dict[str, CachedWeight] | None:
    """Return {name: packed weight} of the tensors `names` in the cache, or None if there is no cache yet.

    Args:
        folder: --quantized_cache.
        files: the model's folder.
        names: names of the tensors that are packed.
        quantizer: the quantizer that packs them.
        device_type: "cuda" or "cpu", the device that packs them.
        vision_parts: modules whose weights are packed with --vision_bits 4 only.

    Raises:
        UserError: the folder holds something else: the weights of another model or of other settings, an
            incomplete cache, or other files.
    """
    origin = f"--quantized_cache {folder}"
    # os.path.exists accepts names of any length.
    if not os.path.exists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{origin}: holds something else, or half a cache (no {MANIFEST}); choose another folder"
        )
    try:
        manifest = read_json(folder / MANIFEST, MAX_INDEX_BYTES)
        same_version = manifest["version"] == VERSION
        assert not same_version or _is_valid(manifest)
    except (UserError, LookupError, TypeError, AttributeError, AssertionError):
        raise UserError(f"{origin}: {MANIFEST} is damaged; delete the folder") from None
    if not same_version:
        raise UserError(f"{origin}: made by another version; delete the folder")
    for name, ours in describe_packer(quantizer, device_type).items():
        if manifest[name] != ours:
            raise UserError(f"{origin}: packed by {manifest[name]}, not {ours}; choose another folder")
    tensors = manifest["tensors"]
    differing = tensors.keys() ^ set(names)
    if differing and all(name.startswith(tuple(f"{part}." for part in vision_parts)) for name in differing):
        has, lacks = ("with", "16") if differing <= tensors.keys() else ("without", "4")
        raise UserError(
            f"{origin}: made {has} --vision_bits 4, and this run has --vision_bits {lacks}; choose another"
            " folder"
        )
    if tensors.keys() != set(names) or manifest["model"] != digest_dense_weights(files, names):
        raise UserError(f"{origin}: holds the packed weights of another model; choose another folder")
    for file, size in manifest["files"].items():
        if not os.path.isfile(folder / file) or os.path.getsize(folder / file) != size:
            raise UserError(f"{origin}: {file} is missing or truncated; delete the folder")
    return {
        name: CachedWeight(name, folder / t["file"], t["crc"], quantizer, files.tensors[name].shape)
        for name, t in tensors.items()
    }


def _is_valid(manifest: dict) -> bool:
    """Return whether a manifest names only files that this program writes, and its values have their types.

    Raises LookupError, TypeError or AttributeError for some manifests that are not valid.
    """
    files, tensors = manifest["files"], manifest["tensors"].values()
    return (
        all(manifest[name].isprintable() for name in ("model", "quantizer", "library", "device"))
        and all(FILE_NAME.fullmatch(file) and type(size) is int for file, size in files.items())
        and all(t["file"] in files and type(t["crc"]) is int for t in tensors)
    )


@dataclass(frozen=True)
class CachePlan:
    """A cache to be written.

    Attributes:
        folder: the cache's folder.
        header: the manifest's entries on version, weights and quantizer.
        n_bytes: bytes of all codes and scales.
    """

    folder: Path
    header: dict
    n_bytes: int


def plan_cache(
    folder: Path,
    files: CheckpointFiles,
    names: list[str],
    quantizer: Quantizer,
    device_type: str,
    output_dir: str,
) -> CachePlan:
    """Return the plan of a cache of the packed tensors `names`, without writing it.

    Args:
        folder, files, names, quantizer, device_type: as for `open_cache`.
        output_dir: --output_dir.

    Raises UserError if the folder is not writable, is a mount point, or is or contains the current folder or
    `output_dir`.
    """
    check_writable(folder, "--quantized_cache")
    folder = Path(os.path.realpath(folder))  # a folder cannot be renamed to a link
    if os.path.ismount(folder):
        raise UserError(f"--quantized_cache {folder}: is a mount point; choose a folder in it")
    for used, name in (os.curdir, "the current folder"), (output_dir, f"--output_dir {output_dir}"):
        if Path(os.path.realpath(used)).is_relative_to(folder):
            raise UserError(f"--quantized_cache {folder}: is {name}, or above it; choose a folder of its own")
    check_writable(folder.parent, "--quantized_cache")  # for the staging folder
    header = {"version": VERSION, "model": digest_dense_weights(files, names)}
    sizes = (sum(quantizer.packed_sizes(files.tensors[name].shape)) for name in names)
    return CachePlan(folder, header | describe_packer(quantizer, device_type), sum(sizes))


@contextlib.contextmanager
def open_cache_writer(plan: CachePlan | None, rank_info: RankInfo) -> Iterator[CacheWriter | None]:
    """Yield a writer for the packed weights of a load, or None without a plan. Collective.

    The run can go on without the cache, so a failed write gives only a warning. If the load fails, the
    incomplete cache is removed.
    """
    if plan is None:
        yield None
        return
    writer = CacheWriter(plan, rank_info.rank, rank_info.rank < rank_info.local_world)
    writer.start()
    with contextlib.ExitStack() as on_error:
        on_error.callback(writer.discard)
        yield writer
        on_error.pop_all()
    writer.finish()


class CacheWriter:
    """Collects and writes the weights that this rank packs.

    Every rank has a writer; only those of the first node write. Several runs may write the same cache at
    once: each has its own staging folder until one is complete.

    writes: whether this rank is on the first node.
    """

    def __init__(self, plan: CachePlan, rank: int, writes: bool):
        self.plan, self.folder, self.rank, self.writes = plan, plan.folder, rank, writes
        self.staging: Path | None = None  # None: no cache is written
        self.error: OSError | None = None
        self.buffered: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, dict] = {}
        self.files: dict[str, int] = {}

    def start(self) -> None:
        """Make the staging folder on rank 0, and share its path or print a warning. Collective."""
        box: list[Path | None] = [None]
        if self.rank == 0:
            try:
                self._make_staging_folder()
                box = [self.staging]
            except OSError as e:
                self._warn(e)
                self.discard()
        dist.broadcast_object_list(box, src=0)
        self.staging = box[0]

    def _make_staging_folder(self) -> None:
        """Make this writer's staging folder, and remove those of interrupted runs. Raises OSError."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for path in self._list_staging_folders():
            with contextlib.suppress(FileNotFoundError):  # another run removes it as well
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
        check_free_space(self.folder.parent, self.plan.n_bytes)
        self.staging = Path(tempfile.mkdtemp(".partial", f"{self.folder.name}.", self.folder.parent))
        self.staging.chmod(0o777 & ~UMASK)  # mkdtemp gives access to one user only

    def _list_staging_folders(self) -> list[Path]:
        """Return the staging folders of all runs that write this cache."""
        return list(self.folder.parent.glob(f"{glob.escape(self.folder.name)}.*.partial"))

    def add(self, name: str, packed: PackedWeight) -> None:
        """Collect the packed weight of the tensor `name`; write a file once FILE_BYTES are collected."""
        if not self.writes or self.staging is None or self.error:
            return
        packed = packed.to(torch.device("cpu"))
        self.buffered |= {f"{name}.codes": packed.codes, f"{name}.scales": packed.scales}
        self.tensors[name] = {"file": self._file_name(), "crc": compute_crc(packed)}
        if sum(t.nbytes for t in self.buffered.values()) >= FILE_BYTES:
            self._flush()

    def _file_name(self) -> str:
        """Return the name of the next file of this rank."""
        return f"packed-{self.rank}-{len(self.files)}.safetensors"

    def _flush(self) -> None:
        """Write the collected weights to a file. `self.error` keeps an OSError; then none is written."""
        if self.buffered:
            assert self.staging is not None
            file = self._file_name()
            try:
                save_tensors(self.buffered, self.staging / file)
                self.files[file] = (self.staging / file).stat().st_size
            except OSError as e:
                self.error = e
                self.discard()  # free the disk at once; other ranks then fail to write, and stop too
            self.buffered = {}

    def finish(self) -> None:
        """Complete the cache, or remove it and print a warning if a rank could not write. Collective."""
        if self.staging is None:
            return
        self._flush()
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (self.files, self.tensors, self.error))
        if self.rank == 0:
            try:
                self._publish(ranks)
            except OSError as e:
                # With a manifest there, another run was first, and its cache is as good.
                if not os.path.isfile(self.folder / MANIFEST):
                    self._warn(e)
                self.discard()
            else:
                for path in self._list_staging_folders():  # no run needs them any more
                    shutil.rmtree(path, ignore_errors=True)
        dist.barrier()

    def _publish(self, ranks: list[tuple[dict, dict, OSError | None]]) -> None:
        """Write the manifest and rename the staging folder. Raises OSError, also that of another rank.

        ranks: (files, tensors, error) of each rank's writer.
        """
        errors = [error for _, _, error in ranks if error]
        if errors:  # prefer the cause to its consequence, ENOENT: a rank with an error removes the folder
            raise min(errors, key=lambda e: e.errno == errno.ENOENT)
        files = {file: size for files, _, _ in ranks for file, size in files.items()}
        tensors = {name: entry for _, tensors, _ in ranks for name, entry in tensors.items()}
        manifest = self.plan.header | {"files": files, "tensors": tensors}
        assert self.staging is not None
        (self.staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        self.staging.rename(self.folder)  # also over an empty folder

    def discard(self) -> None:
        """Remove the staging folder."""
        if self.staging:
            shutil.rmtree(self.staging, ignore_errors=True)

    def _warn(self, e: OSError) -> None:
        problem = f"could not be written ({describe(e)}); the run goes on without it"
        print(f"WARNING: --quantized_cache {self.folder}: {problem}", file=sys.stderr, flush=True)
