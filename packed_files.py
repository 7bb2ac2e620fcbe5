"""Weights that are packed in files already: bitsandbytes' own checkpoints, and our --quantized_cache.

bitsandbytes (QuantState.as_dict, packed): beside `<name>.weight`, the codes, lie `<name>.weight.absmax`,
`.quant_map`, with double quantization `.nested_absmax` and `.nested_quant_map`, and
`.quant_state.bitsandbytes__nf4`, the UTF-8 bytes of a JSON object with shape, block sizes and offset. These are
the same numbers that NF4 in quantizers.py stores, in other places: nothing is quantized again.

The cache: `manifest.json` and `packed-<rank>-<number>.safetensors`, in which `<tensor>.codes` and
`<tensor>.scales` are bytes. The manifest names the model by a digest of the weights that were packed, the
quantizer, and for every file its size, for every tensor its CRC-32. It is made in `<folder>.partial`, which gets
its name when whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import UserError
from quantizers import NF4, SCALE_BLOCK, Quantizer, flat_bytes

STATE = ".quant_state.bitsandbytes__"
MANIFEST, VERSION = "manifest.json", 1
FILE_BYTES = 2**30  # of codes that a rank collects in host memory before it writes them


@dataclass(frozen=True)
class PackedWeight:
    """What a quantizer made of a weight: codes and scales, uint8, 1-D."""

    codes: torch.Tensor
    scales: torch.Tensor

    def to(self, device: torch.device) -> PackedWeight:
        return PackedWeight(self.codes.to(device), self.scales.to(device))


def read_file(path: Path, names: Iterable[str]) -> list[torch.Tensor]:
    with safe_open(path, framework="pt") as f:
        return [f.get_tensor(name) for name in names]


# bitsandbytes' checkpoints


@dataclass(frozen=True)
class BnbWeight:
    """A weight in bitsandbytes' format. files: which file holds the codes, and each companion by its suffix;
    state: the JSON object."""

    name: str
    files: dict[str, Path]
    state: dict

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.state["shape"])

    @property
    def double(self) -> bool:
        return "nested_absmax" in self.files

    @property
    def quantizer(self) -> NF4:
        return NF4(double=self.double)

    def _read(self, suffix: str) -> torch.Tensor:
        return read_file(self.files[suffix], [f"{self.name}.{suffix}" if suffix else self.name])[0]

    def read(self) -> PackedWeight:
        codes, absmax = self._read(""), self._read("absmax")
        if not self.double:
            return PackedWeight(flat_bytes(codes), flat_bytes(absmax))
        offset = torch.tensor([self.state["nested_offset"]], dtype=torch.float32)
        return PackedWeight(flat_bytes(codes), flat_bytes(self._read("nested_absmax"), offset, absmax))

    def check(self) -> None:
        """Raises UserError for anything but NF4 with the block sizes and tables that NF4 in quantizers.py has."""
        where = f"{self.files['']}: {self.name}"
        expected = {"quant_type": "nf4", "blocksize": NF4.block} | (
            {"nested_blocksize": SCALE_BLOCK} if self.double else {}
        )
        for key, value in expected.items():
            if self.state.get(key) != value:
                raise UserError(f"{where}: packed with {key} {self.state.get(key)}; only {value} can be read")
        tables = {"quant_map": bnb.get_4bit_type("nf4", device="cpu")}
        if self.double:
            tables["nested_quant_map"] = bnb.create_dynamic_map()
        for suffix, table in tables.items():
            if suffix not in self.files or not torch.allclose(self._read(suffix).float(), table, atol=1e-6):
                raise UserError(f"{where}: its {suffix} is not that of nf4")


def find_bnb(folder: Path, raw: dict[str, str]) -> dict[str, BnbWeight]:
    """The packed weights among a folder's tensors, by name. raw: {tensor: file}; loses what belongs to them."""
    found = {}
    for key in [k for k in raw if STATE in k]:
        name, _, kind = key.partition(STATE)
        prefix = f"{name}."
        companions = [k for k in raw if k.startswith(prefix) and k != key]
        files = {k.removeprefix(prefix): folder / raw[k] for k in companions}
        try:
            state = json.loads(bytes(read_file(folder / raw[key], [key])[0].tolist()))
            files[""] = folder / raw[name]
            found[name] = BnbWeight(name, files, state | {"quant_type": kind})
            assert all(isinstance(n, int) for n in state["shape"]) and "absmax" in files
        except (ValueError, LookupError, TypeError, AssertionError):
            raise UserError(f"{folder / raw[key]}: {key} does not describe a packed weight") from None
        found[name].check()
        for k in [*companions, key, name]:
            del raw[k]
    return found


def check_stored_quantization(description: dict | None, folder: Path) -> bool:
    """Whether a model is packed by bitsandbytes. description: config.json's quantization_config. Raises
    UserError for a kind that cannot be read."""
    if not description:
        return False
    method = description.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in description else "?")
    if method == "bitsandbytes" and description.get("load_in_4bit"):
        return True
    kind = "bitsandbytes 8 bit" if method == "bitsandbytes" else str(method)
    raise UserError(
        f"{folder}/config.json: the weights are quantized already ({kind}); only 16- and 32-bit weights and"
        " bitsandbytes' 4 bits (nf4) can be read"
    )


# The cache


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
            packed = PackedWeight(*read_file(self.file, [f"{self.name}.codes", f"{self.name}.scales"]))
        except (SafetensorError, OSError) as e:
            raise UserError(f"--quantized_cache: {self.file} is damaged ({e}); delete the folder") from None
        if crc(packed) != self.crc:
            raise UserError(f"--quantized_cache: {self.file} is damaged ({self.name}); delete the folder")
        return packed


def crc(packed: PackedWeight) -> int:
    return zlib.crc32(packed.scales.numpy(), zlib.crc32(packed.codes.numpy()))


def digest(files, names: list[str]) -> str:
    """Names a model by what was packed: of every weight its name, shape, dtype, and its first, middle and last
    row. files: a CheckpointFiles."""
    by_file: dict[str, list[str]] = {}
    for name in sorted(names):
        by_file.setdefault(files.tensors[name].file, []).append(name)
    parts = {}
    for file, inside in by_file.items():
        with safe_open(files.folder / file, framework="pt") as f:
            for name in inside:
                stored, rows = files.tensors[name], f.get_slice(name)
                hashed = hashlib.sha256(f"{name} {stored.shape} {stored.dtype}".encode())
                for row in {0, stored.shape[0] // 2, stored.shape[0] - 1}:
                    hashed.update(flat_bytes(rows[row : row + 1]).numpy())
                parts[name] = hashed.hexdigest()
    return hashlib.sha256("".join(parts[name] for name in sorted(parts)).encode()).hexdigest()


def open_cache(folder: Path, files, names: list[str], quantizer: Quantizer) -> dict[str, CachedWeight] | None:
    """The packed weights of `names`; None if there is no cache yet. Raises UserError if the folder holds
    something else: another model's or other settings' weights, half a cache, no cache at all."""
    where = f"--quantized_cache {folder}"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{where}: holds something else, or half a cache (no {MANIFEST}); choose another folder"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, sizes, tensors = manifest["version"], manifest["files"], manifest["tensors"]
        entries = {n: CachedWeight(n, folder / t["file"], t["crc"], quantizer) for n, t in tensors.items()}
        described = manifest["quantizer"], manifest["model"]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{where}: {MANIFEST} is damaged; delete the folder") from None
    if version != VERSION:
        raise UserError(f"{where}: made by another version; delete the folder")
    if described[0] != repr(quantizer):
        raise UserError(f"{where}: packed by {described[0]}, not {quantizer!r}; choose another folder")
    if entries.keys() != set(names) or described[1] != digest(files, names):
        raise UserError(f"{where}: holds the packed weights of another model; choose another folder")
    for file, size in sizes.items():
        if not (folder / file).is_file() or (folder / file).stat().st_size != size:
            raise UserError(f"{where}: {file} is missing or cut; delete the folder")
    return entries


class CacheWriter:
    """Collects what this rank packs and writes it. Every rank has one; those of the first node write."""

    def __init__(self, folder: Path, model: str, quantizer: Quantizer, rank: int, writes: bool):
        self.folder, self.partial = folder, folder.with_name(f"{folder.name}.partial")
        self.rank, self.writes = rank, writes
        self.head = {"version": VERSION, "model": model, "quantizer": repr(quantizer)}
        self.waiting: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, dict] = {}
        self.files: dict[str, int] = {}

    def start(self) -> None:
        """Collective: an earlier attempt that was cut goes."""
        if self.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        dist.barrier()

    def add(self, name: str, packed: PackedWeight) -> None:
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
            save_file(self.waiting, self.partial / file)
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
            if self.folder.is_dir():
                self.folder.rmdir()  # it was empty; if another run has filled it by now, this raises
            self.partial.rename(self.folder)
        dist.barrier()
