"""A model's folder: found locally or downloaded from the hub, its safetensors headers read and checked.

Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the raw tensors). There is
one file `model.safetensors`, or several with `model.safetensors.index.json`, whose "weight_map" names the
file of each tensor. Only headers are read here; the weights stay on disk until they are streamed.
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

from files.bnb_weights import find_bnb_weights
from files.hub_errors import HUB_ERRORS
from files.links import points_outside
from files.names import ADAPTER_CONFIG, CONFIG, INDEX, SINGLE_FILE, split_revision
from files.tensors import PinnedBuffers, StoredTensor, StreamedTensor, list_tensors, read_tensor
from files.weight_sets import compare_weight_sets
from options.config import TOY_MODEL
from options.errors import UserError
from options.limits import MAX_INDEX_BYTES, read_json
from quantization.quantizers import PackedWeight, Quantizer

TOY_BASE = Path(__file__).parent.parent / "models" / "toy_base"  # made by tools/pretrain_toy_base.py


class StoredPackedWeight(Protocol):
    """Interface of packed weights in files: BnbWeight, bnb_weights.py, and CachedWeight, weight_cache.py."""

    @property
    def quantizer(self) -> Quantizer: ...

    def read(self) -> PackedWeight: ...


class CheckpointFiles:
    """The tensors of a model folder, by name.

    Attributes:
        folder: the folder.
        tensors: all tensors.
        packed: those of them that are stored packed, by bitsandbytes or in a cache.
        unmatched: tensors that only one of two sets of weights holds.
        prequantized: whether bitsandbytes packed some of them.
    """

    def __init__(self, folder: Path, only_file: str | None = None):
        """Read and check the headers of a folder's weight files, or of `only_file` alone. Raises UserError.

        Raises OSError if weights cannot be read to compare two sets of them, or to describe packed ones.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.packed: dict[str, StoredPackedWeight] = {}
        for file, names in ({only_file: None} if only_file else _list_weight_files(folder)).items():
            self._read_header(file, names)
        self.unmatched = [] if only_file else compare_weight_sets(folder, dict(self.tensors))
        self.packed.update(find_bnb_weights(folder, self.tensors))
        self.prequantized = bool(self.packed)
        for name, tensor in self.tensors.items():
            if name not in self.packed and not (
                isinstance(tensor.dtype, torch.dtype) and tensor.dtype.is_floating_point
            ):
                raise UserError(
                    f"{folder / tensor.file}: tensor {name} is stored as {tensor.dtype}; expected"
                    " floating-point weights, or bitsandbytes' 4 bits"
                )

    def _read_header(self, file: str, expected: set[str] | None) -> None:
        """Add the tensors in a file's header to `self.tensors`. Raises UserError for a file of no use.

        expected: names that the index assigns to the file; UserError for those that it lacks.
        """
        path = self.folder / file
        if points_outside(path):
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
        """Return a copy with the tensors of `other` added, in place of those of the same name."""
        folder = other.folder.absolute()  # a relative path would be resolved below self.folder
        replacements = {name: replace(t, file=str(folder / t.file)) for name, t in other.tensors.items()}
        combined = copy.copy(self)
        combined.tensors = self.tensors | replacements
        return combined

    def tensor_origin(self, name: str) -> str:
        """Return a tensor's file and name, for messages."""
        return f"{self.folder / self.tensors[name].file}: {name}"

    @overload
    def read(self, name: str, buffers: None = None) -> torch.Tensor | PackedWeight: ...
    @overload
    def read(
        self, name: str, buffers: PinnedBuffers | None
    ) -> torch.Tensor | PackedWeight | StreamedTensor: ...
    def read(
        self, name: str, buffers: PinnedBuffers | None = None
    ) -> torch.Tensor | PackedWeight | StreamedTensor:
        """Read a tensor to the CPU, or start to stream it to a GPU if `buffers` are given.

        A weight that is stored packed is returned packed, on the CPU. Raises OSError, and UserError for a
        damaged packed weight.
        """
        if name in self.packed:
            return self.packed[name].read()
        return read_tensor(self.folder, self.tensors[name], buffers)


def _list_weight_files(folder: Path) -> Mapping[str, set[str] | None]:
    """Return {file name: names of the tensors that the index assigns to it, or None without an index}.

    Raises UserError if there are no weights, or the index is damaged.
    """
    if (folder / INDEX).is_file():
        try:
            weight_map = read_json(folder / INDEX, MAX_INDEX_BYTES)["weight_map"]
            files: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                files.setdefault(file, set()).add(name)
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / INDEX}: not an index with a weight_map") from None
        for file in files:
            # A name that cannot be printed (a NUL, half a character) cannot be opened either.
            if not isinstance(file, str) or not file.isprintable() or not file or Path(file).name != file:
                raise UserError(f"{folder / INDEX}: {file!r} is not a plain file name")
        # When transformers saves a single file over shards, it deletes them but not their index.
        if (folder / SINGLE_FILE).is_file() and not any((folder / file).is_file() for file in files):
            return {SINGLE_FILE: None}
        return files
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pth"))
    hint = f"; {others[0]} is a pickle, which is never loaded: convert it to safetensors" if others else ""
    raise UserError(f"--model_name {folder}: no weights here ({SINGLE_FILE} or {INDEX}){hint}")


def pin_model_name(name: str, folder: Path) -> str:
    """Return a model's name that stays valid: `owner/name@commit`, an absolute path, or TOY_MODEL itself.

    folder: where `find_model` found it.
    """
    if name == TOY_MODEL:
        return name
    if os.path.isdir(os.path.expanduser(name)):
        return str(folder.resolve())
    return f"{split_revision(name)[0]}@{folder.name}"  # the hub's cache names a snapshot by its commit


def find_model(name: str) -> Path:
    """Return the local folder of a model, downloaded from the hub without weights if `name` is a hub id.

    The weights follow by `fetch_weights`, so that an unknown architecture costs no download of gigabytes.

    Args:
        name: a folder, or a hub id with or without `@revision` (a branch, a tag or a commit), or TOY_MODEL,
            the demo's model, also if there is a folder of that name.

    Raises:
        UserError: it is neither, is not accessible, holds no config.json, or holds an adapter too.
    """
    local = os.path.expanduser(name)  # os.path accepts any text; Path raises for some
    if name == TOY_MODEL:
        folder = TOY_BASE
    elif os.path.isdir(local):
        folder = Path(local)
    else:
        folder = download(name, "--model_name", "*.json", "*.jinja", "*.model", "*.txt")
    if not (folder / CONFIG).is_file():
        raise UserError(f"--model_name {name}: no {CONFIG} in this folder")
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"--model_name {name}: holds an adapter ({ADAPTER_CONFIG}) beside the model, which transformers"
            " with PEFT puts over it: move one of them away, or merge them first"
        )
    return folder


def fetch_weights(name: str, folder: Path) -> None:
    """Download a hub model's safetensors files into its snapshot; do nothing for a local folder.

    Args:
        name: result of `pin_model_name`, since a branch may have moved since.
        folder: the snapshot that `find_model` returned.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    if not os.path.isdir(os.path.expanduser(name)) and name != TOY_MODEL:
        assert download(name, "--model_name", "*.safetensors") == folder


def download(name: str, option: str, *patterns: str) -> Path:
    """Download the files of a hub repository that match a pattern, and return their folder.

    Raises UserError, which names the option that `name` was given by.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = split_revision(name)
    nested = [pattern for pattern in patterns if "/" in pattern]
    try:
        if nested:
            snapshot_download(repository, revision=revision, allow_patterns=nested)
        # Other subfolders and consolidated*.safetensors hold the same weights in other formats.
        return Path(snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[pattern for pattern in patterns if pattern not in nested],
            ignore_patterns=["*/*", "consolidated*"],
        ))  # fmt: skip
    except HFValidationError:
        raise UserError(f"{option} {name}: no such folder, and not a hub id (owner/name)") from None
    except LocalEntryNotFoundError:
        raise UserError(f"{option} {name}: no such folder, and the hub cannot be reached") from None
    except RevisionNotFoundError:
        raise UserError(
            f"{option} {name}: on the hub {repository} has no branch, tag or commit {revision}"
        ) from None
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        reason: dict[int | None, str] = {
            401: "does not exist, or needs `hf auth login`",
            403: "is gated: ask for access on its page",
        }
        problem = reason.get(
            status, "does not exist" if status == 404 else f"could not be fetched ({status})"
        )
        raise UserError(f"{option} {name}: no such folder, and on the hub it {problem}") from None
    except HUB_ERRORS as e:
        raise UserError(f"{option} {name}: could not be fetched from the hub ({e})") from None


def digest_structure(config: PretrainedConfig, files: CheckpointFiles) -> str:
    """Return a digest of a model's config and of the names and shapes of its weights.

    It depends neither on the version of transformers that wrote the model nor on the folder.
    """
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
               "quantization_config")  # fmt: skip
    settings = {k: v for k, v in config.to_dict().items() if k not in ignored}
    shapes = {name: stored.shape for name, stored in sorted(files.tensors.items())}
    return hashlib.sha256(json.dumps([settings, shapes], sort_keys=True, default=str).encode()).hexdigest()
