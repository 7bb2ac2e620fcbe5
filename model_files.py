"""A model's folder: found locally or fetched from the hub, its safetensors headers read and checked.

Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the raw tensors), one
file `model.safetensors` or several with `model.safetensors.index.json`, whose "weight_map" says which
file holds a tensor. Only headers are read here; the weights stay on disk until they are streamed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from bnb_files import find_bnb
from config import TOY_MODEL, UserError
from quantizers import PackedWeight, Quantizer
from tensor_files import read_tensors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says of it; of a packed weight, the shape that it stands for."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class StoredPacked(Protocol):
    """A weight that some file holds packed: bnb_files.BnbWeight, weight_cache.CachedWeight."""

    quantizer: Quantizer

    def read(self) -> PackedWeight: ...


class CheckpointFiles:
    """The tensors of a model folder, by name: `tensors`, and in `packed` those of them that some file holds
    packed already, bitsandbytes' own or a cache's.

    only: the name of one safetensors file in the folder, to read that one and nothing else.
    """

    def __init__(self, folder: Path, only: str | None = None):
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.packed: dict[str, StoredPacked] = {}
        raw: dict[str, str] = {}
        for file, names in ({only: None} if only else _files(folder)).items():
            self._read_header(file, names, raw)
        self._find_packed(raw)
        self.prequantized = bool(self.packed)

    def _read_header(self, file: str, expected: set[str] | None, raw: dict[str, str]) -> None:
        """Adds what a file holds to `raw` {tensor: file} and, where it is a float, to self.tensors."""
        path = self.folder / file
        if not path.is_file():
            raise UserError(f"--model_name {self.folder}: shard {file} is missing (it is named in {INDEX})")
        try:
            with safe_open(path, framework="pt") as f:
                names = set(f.keys())
                for name in sorted(names):
                    if name in raw:
                        raise UserError(f"{path}: tensor {name} is in {raw[name]} as well")
                    raw[name], header = file, f.get_slice(name)
                    stored = header.get_dtype()
                    self.tensors[name] = StoredTensor(
                        file, tuple(header.get_shape()), FLOATS.get(stored, stored)
                    )
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path}: truncated or not a safetensors file ({e})") from None
        for name in sorted((expected or set()) - names):
            raise UserError(f"{path}: tensor {name} is missing; {INDEX} says it is in this file")

    def _find_packed(self, raw: dict[str, str]) -> None:
        """Makes one tensor of those by which bitsandbytes stores a packed weight."""
        self.packed = find_bnb(self.folder, raw)
        stored = {name: self.tensors[name] for name in raw}
        for name, weight in self.packed.items():
            stored[name] = StoredTensor(self.tensors[name].file, weight.shape, torch.uint8)
        self.tensors = stored
        for name, tensor in stored.items():
            if isinstance(tensor.dtype, str):
                raise UserError(
                    f"{self.folder / tensor.file}: tensor {name} is stored as {tensor.dtype}; expected"
                    " floating-point weights, or bitsandbytes' 4 bits"
                )

    def read(self, name: str) -> torch.Tensor | PackedWeight:
        """The tensor on the CPU, mapped from the file rather than copied where the platform can; packed, if
        it is so in a file. The file is opened anew each time: what was read does not stay mapped."""
        if name in self.packed:
            return self.packed[name].read()
        return read_tensors(self.folder / self.tensors[name].file, [name])[0]


def _files(folder: Path) -> dict[str, set[str] | None]:
    """{file name: the tensors that the index puts there, or None without an index}."""
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, set[str] | None] = {}
            for name, file in weight_map.items():
                files.setdefault(file, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / INDEX}: not an index with a weight_map") from None
        for file in files:
            if not isinstance(file, str) or not file or Path(file).name != file:
                raise UserError(f"{folder / INDEX}: {file!r} is not a plain file name")
        return files
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pth"))
    hint = f"; {others[0]} is a pickle, which is never loaded: convert it to safetensors" if others else ""
    raise UserError(f"--model_name {folder}: no weights here ({SINGLE} or {INDEX}){hint}")


def find_model(name: str) -> Path:
    """The local folder of a model: `name` itself, or the hub's snapshot of that id, still without weights,
    so that an unknown architecture costs no download of gigabytes.

    Raises UserError if it is neither, is not accessible, or holds no config.json.
    """
    local = os.path.expanduser(name)  # os.path takes any text, where Path raises for some
    folder = Path(local) if os.path.isdir(local) else _download(name, "*.json", "*.jinja", "*.model", "*.txt")
    if not (folder / "config.json").is_file():
        raise UserError(f"--model_name {name}: no config.json in this folder")
    return folder


def fetch_weights(name: str, folder: Path) -> None:
    """Completes what `find_model` found with its safetensors files. Nothing to do for a local folder."""
    if not os.path.isdir(os.path.expanduser(name)) and name != TOY_MODEL:
        assert _download(name, "*.safetensors") == folder


def _download(name: str, *patterns: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Subfolders and consolidated*.safetensors hold the same weights in other formats.
        return Path(
            snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*", "consolidated*"])
        )
    except HFValidationError:
        raise UserError(f"--model_name {name}: no such folder, and not a hub id (owner/name)") from None
    except LocalEntryNotFoundError:
        raise UserError(f"--model_name {name}: no such folder, and the hub cannot be reached") from None
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        reason = {
            401: "does not exist, or needs `hf auth login`",
            403: "is gated: ask for access on its page",
        }
        what = reason.get(status, "does not exist" if status == 404 else f"could not be fetched ({status})")
        raise UserError(f"--model_name {name}: no such folder, and on the hub it {what}") from None
    except OSError as e:
        raise UserError(f"--model_name {name}: could not be fetched from the hub ({e})") from None
