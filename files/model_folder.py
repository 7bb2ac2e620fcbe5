"""A model's folder: found locally or fetched from the hub, its safetensors headers read and checked.

Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the raw tensors), one
file `model.safetensors` or several with `model.safetensors.index.json`, whose "weight_map" says which
file holds a tensor. Only headers are read here; the weights stay on disk until they are streamed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol, overload

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig

from files.bnb_weights import find_bnb
from files.hub_errors import HUB_ERRORS
from files.links import leads_out
from files.names import ADAPTER_CONFIG, CONFIG, INDEX, SINGLE, split_revision
from files.tensors import Stage, Staged, StoredTensor, list_tensors, read_tensor
from files.weight_sets import Extra, compare_sets
from options.config import TOY_MODEL
from options.errors import UserError
from options.limits import MAX_INDEX_BYTES, read_json
from quantization.quantizers import PackedWeight, Quantizer


class StoredPacked(Protocol):
    """A weight that some file holds packed: BnbWeight in bnb_weights.py, CachedWeight in weight_cache.py."""

    @property
    def quantizer(self) -> Quantizer: ...

    def read(self) -> PackedWeight: ...


class CheckpointFiles:
    """The tensors of a model folder, by name: `tensors`, and in `packed` those of them that some file holds
    packed already, bitsandbytes' own or a cache's. `extras`: tensors that only one of two
    sets of weights holds.

    only: the name of one safetensors file in the folder, to read that one and nothing else.
    """

    def __init__(self, folder: Path, only: str | None = None):
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.packed: dict[str, StoredPacked] = {}
        for file, names in ({only: None} if only else _files(folder)).items():
            self._read_header(file, names)
        self.extras: list[Extra] = [] if only else compare_sets(folder, dict(self.tensors))
        self.packed.update(find_bnb(folder, self.tensors))
        self.prequantized = bool(self.packed)
        for name, tensor in self.tensors.items():
            if name not in self.packed and not (
                isinstance(tensor.dtype, torch.dtype) and tensor.dtype.is_floating_point
            ):
                raise UserError(
                    f"{folder / tensor.file}: tensor {name} is stored as {tensor.dtype}; expected floating-point"
                    " weights, or bitsandbytes' 4 bits"
                )

    def _read_header(self, file: str, expected: set[str] | None) -> None:
        path = self.folder / file
        if leads_out(path):
            raise UserError(
                f"{path}: is a link out of the folder, to {os.path.realpath(path)}; put the file here"
            )
        if not path.is_file():
            raise UserError(f"--model_name {self.folder}: shard {file} is missing (it is named in {INDEX})")
        try:
            found = list_tensors(path)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path}: truncated or not a safetensors file ({e})") from None
        for name in sorted(found.keys() & self.tensors.keys()):
            raise UserError(f"{path}: tensor {name} is in {self.tensors[name].file} as well")
        for name in sorted((expected or set()) - found.keys()):
            raise UserError(f"{path}: tensor {name} is missing; {INDEX} says it is in this file")
        self.tensors |= {name: found[name] for name in sorted(found)}

    def overlaid_by(self, other: CheckpointFiles) -> CheckpointFiles:
        """These tensors, but for those that `other` holds, which are read from its files."""
        folder = other.folder.absolute()  # a relative one would be below self.folder
        held = {
            name: replace(tensor, file=str(folder / tensor.file)) for name, tensor in other.tensors.items()
        }
        made = copy.copy(self)
        made.tensors = self.tensors | held
        return made

    def where(self, name: str) -> str:
        """A tensor's file and its name, for messages."""
        return f"{self.folder / self.tensors[name].file}: {name}"

    @overload
    def read(self, name: str, stage: None = None) -> torch.Tensor | PackedWeight: ...
    @overload
    def read(self, name: str, stage: Stage | None) -> torch.Tensor | PackedWeight | Staged: ...
    def read(self, name: str, stage: Stage | None = None) -> torch.Tensor | PackedWeight | Staged:
        """The tensor on the CPU, or with a stage on its way to a GPU; packed, if it is so in a file."""
        if name in self.packed:
            return self.packed[name].read()
        return read_tensor(self.folder, self.tensors[name], stage)


def _files(folder: Path) -> Mapping[str, set[str] | None]:
    """{file name: the tensors that the index puts there, or None without an index}."""
    if (folder / INDEX).is_file():
        try:
            weight_map = read_json(folder / INDEX, MAX_INDEX_BYTES)["weight_map"]
            files: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                files.setdefault(file, set()).add(name)
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / INDEX}: not an index with a weight_map") from None
        for file in files:
            # What cannot be printed cannot be opened either: a NUL, half a character.
            if not isinstance(file, str) or not file.isprintable() or not file or Path(file).name != file:
                raise UserError(f"{folder / INDEX}: {file!r} is not a plain file name")
        # An index without shards is what transformers leaves where it saves a single file over them.
        if (folder / SINGLE).is_file() and not any((folder / file).is_file() for file in files):
            return {SINGLE: None}
        return files
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pth"))
    hint = f"; {others[0]} is a pickle, which is never loaded: convert it to safetensors" if others else ""
    raise UserError(f"--model_name {folder}: no weights here ({SINGLE} or {INDEX}){hint}")


def recorded_name(name: str, folder: Path) -> str:
    """A model's name that means the same from any folder and at any time: `owner/name@commit`, or an absolute
    path. folder: where `find_model` found it."""
    if name == TOY_MODEL:
        return name
    if os.path.isdir(os.path.expanduser(name)):
        return str(folder.resolve())
    return f"{split_revision(name)[0]}@{folder.name}"  # the hub's cache names a snapshot by its commit


def find_model(name: str) -> Path:
    """The local folder of a model: `name` itself, or the hub's snapshot of that id, still without weights,
    so that an unknown architecture costs no download of gigabytes. name: a folder, or a hub id, with or
    without `@revision`: a branch, a tag or a commit.

    Raises UserError if it is neither, is not accessible, or holds no config.json.
    """
    local = os.path.expanduser(name)  # os.path takes any text, where Path raises for some
    folder = Path(local) if os.path.isdir(local) else _download(name, "*.json", "*.jinja", "*.model", "*.txt")
    if not (folder / CONFIG).is_file():
        raise UserError(f"--model_name {name}: no {CONFIG} in this folder")
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"--model_name {name}: holds an adapter ({ADAPTER_CONFIG}) beside the model, which transformers"
            " with PEFT puts over it: move one of them away, or merge them first"
        )
    return folder


def fetch_weights(name: str, folder: Path) -> None:
    """Completes what `find_model` found with its safetensors files. Nothing to do for a local folder. name:
    as `recorded_name` gives it, since a branch may have moved on meanwhile."""
    if not os.path.isdir(os.path.expanduser(name)) and name != TOY_MODEL:
        assert _download(name, "*.safetensors") == folder


def _download(name: str, *patterns: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = split_revision(name)
    # Subfolders and consolidated*.safetensors hold the same weights in other formats.
    others = ["*/*", "consolidated*"]
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=others
            )
        )
    except HFValidationError:
        raise UserError(f"--model_name {name}: no such folder, and not a hub id (owner/name)") from None
    except LocalEntryNotFoundError:
        raise UserError(f"--model_name {name}: no such folder, and the hub cannot be reached") from None
    except RevisionNotFoundError:
        raise UserError(
            f"--model_name {name}: on the hub {repository} has no branch, tag or commit {revision}"
        ) from None
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        reason: dict[int | None, str] = {
            401: "does not exist, or needs `hf auth login`",
            403: "is gated: ask for access on its page",
        }
        what = reason.get(status, "does not exist" if status == 404 else f"could not be fetched ({status})")
        raise UserError(f"--model_name {name}: no such folder, and on the hub it {what}") from None
    except HUB_ERRORS as e:
        raise UserError(f"--model_name {name}: could not be fetched from the hub ({e})") from None


def base_digest(config: PretrainedConfig, files: CheckpointFiles) -> str:
    """Names the model that an adapter belongs to: its config and the names and shapes of its weights, not the
    version of transformers that wrote it or the folder where it lies."""
    ignored = (
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "quantization_config",
    )
    described = {k: v for k, v in config.to_dict().items() if k not in ignored}
    shapes = {name: stored.shape for name, stored in sorted(files.tensors.items())}
    return hashlib.sha256(json.dumps([described, shapes], sort_keys=True, default=str).encode()).hexdigest()
