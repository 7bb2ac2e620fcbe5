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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import overload

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig

from files.bnb_weights import BnbWeight, find_bnb_weights
from files.config_parts import text_config
from files.expert_stacks import ExpertTensor, StreamedExpert, find_mxfp4_stacks
from files.hub_errors import translate_hub_errors
from files.links import points_outside
from files.names import ADAPTER_CONFIG, CARD, CONFIG, INDEX, SINGLE_FILE, split_revision
from files.quantized_releases import gguf_error, is_gguf_release
from files.tensors import PinnedBuffers, StoredTensor, StreamedTensor, list_tensors, read_tensor
from files.weight_headers import WeightHeaders
from files.weight_sets import UnmatchedTensor, compare_weight_sets
from options.config import EMBEDDED_MODELS, TOY_MODEL, TOY_VISION
from options.errors import UserError
from options.limits import MAX_INDEX_BYTES, read_json
from quantization.quantizers import PackedWeight

TOY_BASE = Path(__file__).parent.parent / "models" / "toy_base"  # made by tools/pretrain_toy_base.py
TOY_VISION_BASE = TOY_BASE.parent / "toy_vision"  # made by tools/pretrain_toy_vision.py
EMBEDDED_FOLDERS = {TOY_MODEL: TOY_BASE, TOY_VISION: TOY_VISION_BASE}


class CheckpointFiles(WeightHeaders):
    """The tensors of a model folder, by name, to be read.

    Attributes:
        unmatched: tensors that only one of two sets of weights holds.
    """

    apart: CheckpointFiles | None

    def __init__(self, folder: Path, only_file: str | None = None):
        """Read and check the headers of a folder's weight files, or of `only_file` alone. Raises UserError.

        Raises OSError if weights cannot be read to compare two sets of them, or to describe packed ones.
        """
        super().__init__(folder)
        for file, names in ({only_file: None} if only_file else list_weight_files(folder)).items():
            self.add_file(file, read_file_header(folder, file), names)
        self.unmatched = [] if only_file else compare_weight_sets(folder, dict(self.tensors))
        find_mxfp4_stacks(folder, self.tensors)
        self.set_packed(find_bnb_weights(folder, self.tensors))

    def overlaid_by(self, other: CheckpointFiles) -> CheckpointFiles:
        """Return a copy with the tensors of `other` added, in place of those of the same name."""
        folder = other.folder.absolute()  # a relative path would be resolved below self.folder
        replacements = {name: replace(t, file=str(folder / t.file)) for name, t in other.tensors.items()}
        combined = copy.copy(self)
        combined.tensors = self.tensors | replacements
        return combined

    def tensor_origin(self, name: str) -> str:
        """Return a tensor's file and name, for messages."""
        return f"{self.folder / self.tensors[name].file}: {self.stored_name(name)}"

    def rename(
        self,
        parameter_name: Callable[[str], str],
        is_unused: Callable[[str], bool],
        is_of_vision: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Rename the tensors, those of `unmatched` too; see `WeightHeaders.rename`."""
        super().rename(parameter_name, is_unused, is_of_vision)
        sets = {id(extra.tensors): extra.tensors for extra in self.unmatched}  # two, which they share
        renamed = {
            key: {parameter_name(name): stored for name, stored in tensors.items()}
            for key, tensors in sets.items()
        }
        self.unmatched = [
            UnmatchedTensor(parameter_name(extra.name), renamed[id(extra.tensors)], extra.missing_from)
            for extra in self.unmatched
        ]

    @overload
    def read(self, name: str, buffers: None = None) -> torch.Tensor | PackedWeight: ...
    @overload
    def read(
        self, name: str, buffers: PinnedBuffers | None
    ) -> torch.Tensor | PackedWeight | StreamedTensor | StreamedExpert: ...
    def read(
        self, name: str, buffers: PinnedBuffers | None = None
    ) -> torch.Tensor | PackedWeight | StreamedTensor | StreamedExpert:
        """Read a tensor to the CPU, or start to stream it to a GPU if `buffers` are given.

        A weight that is stored packed is returned packed, on the CPU, or as fp32 if it is one of
        `dequantized`. Raises OSError, and UserError for a
        damaged packed weight.
        """
        packed = self.packed.get(name)
        if name in self.dequantized:
            assert isinstance(packed, BnbWeight)  # a cache holds no others than 4-bit layers
            return packed.dequantize()
        if packed:
            return packed.read()
        stored = self.tensors[name]
        if isinstance(stored, ExpertTensor):
            return stored.read(self.folder, buffers)
        return read_tensor(self.folder, stored, buffers)


def read_file_header(folder: Path, file: str) -> dict[str, StoredTensor]:
    """Return the tensors of a weight file by name. Raises UserError for a file that is of no use."""
    path = folder / file
    if points_outside(path):
        raise UserError(
            f"{path}: is a link out of the folder, to {os.path.realpath(path)}; put the file here"
        )
    if not path.is_file():
        raise UserError(f"--model_name {folder}: shard {file} is missing (it is named in {INDEX})")
    try:
        return list_tensors(path)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: truncated or not a safetensors file ({e})") from None


def list_weight_files(folder: Path) -> Mapping[str, set[str] | None]:
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
    if is_gguf_release(folder):
        raise gguf_error(folder)
    others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pth"))
    hint = f"; {others[0]} is a pickle, which is never loaded: convert it to safetensors" if others else ""
    raise UserError(f"--model_name {folder}: no weights here ({SINGLE_FILE} or {INDEX}){hint}")


def pin_model_name(name: str, folder: Path) -> str:
    """Return a model's name that stays valid: `owner/name@commit`, an absolute path, or an embedded name.

    folder: where `find_model` found it.
    """
    if name in EMBEDDED_MODELS:
        return name
    if os.path.isdir(os.path.expanduser(name)):
        return str(folder.resolve())
    return f"{split_revision(name)[0]}@{folder.name}"  # the hub's cache names a snapshot by its commit


# What a run reads of a hub's model before its weights: settings, tokenizer, templates, what it was made from.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", CARD)


def find_model(name: str, patterns: Sequence[str] = SMALL_FILES) -> Path:
    """Return the local folder of a model, downloaded from the hub without weights if `name` is a hub id.

    The weights follow by `fetch_weights`, so that an unknown architecture costs no download of gigabytes.

    Args:
        name: a folder, or a hub id with or without `@revision` (a branch, a tag or a commit), or one
            of EMBEDDED_MODELS, also if there is a folder of that name.
        patterns: files to download from the hub.

    Raises:
        UserError: it is neither, is not accessible, or holds no config.json, GGUF files alone or an adapter.
    """
    local = os.path.expanduser(name)  # os.path accepts any text; Path raises for some
    if name in EMBEDDED_FOLDERS:
        folder = EMBEDDED_FOLDERS[name]
    elif os.path.isdir(local):
        folder = Path(local)
    elif local.lower().endswith(".gguf") and os.path.isfile(local):
        raise gguf_error(Path(local).parent)
    else:
        folder = download(name, "--model_name", *patterns)
    if not (folder / CONFIG).is_file():
        missing = UserError(f"--model_name {name}: no {CONFIG} in this folder")
        raise gguf_error(folder) if is_gguf_release(folder) else missing
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
    if not os.path.isdir(os.path.expanduser(name)) and name not in EMBEDDED_MODELS:
        assert download(name, "--model_name", "*.safetensors") == folder


def download(name: str, option: str, *patterns: str) -> Path:
    """Download the files of a hub repository that match a pattern, and return their folder.

    Raises UserError, which names the option that `name` was given by.
    """
    from huggingface_hub import constants, snapshot_download

    repository, revision = split_revision(name)
    nested = [pattern for pattern in patterns if "/" in pattern]
    # huggingface_hub 1.33 asks the hub which files a commit has, also in offline mode, unless that version
    # downloaded them itself.
    fetch = partial(
        snapshot_download, repository, revision=revision, local_files_only=constants.HF_HUB_OFFLINE
    )
    with translate_hub_errors(option, name):
        if nested:
            fetch(allow_patterns=nested)
        # Other subfolders and consolidated*.safetensors hold the same weights in other formats.
        others = [pattern for pattern in patterns if pattern not in nested]
        return Path(fetch(allow_patterns=others, ignore_patterns=["*/*", "consolidated*"]))


def digest_structure(config: PretrainedConfig, files: CheckpointFiles) -> str:
    """Return a digest of a model's config and of the names and shapes of its weights, without vision parts.

    It depends neither on the version of transformers that wrote the model nor on the folder, nor on whether
    training adds the auxiliary loss of routers.
    """
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
               "quantization_config", "output_router_logits", "router_aux_loss_coef")  # fmt: skip
    text = text_config(config)  # of a wrapper: a text model may be trained with and without images
    settings = {k: v for k, v in text.to_dict().items() if k not in ignored}
    if text is not config:
        settings |= {"wrapper": config.model_type, "tie_word_embeddings": config.tie_word_embeddings}
    shapes = {name: t.shape for name, t in sorted(files.tensors.items()) if name not in files.vision}
    return hashlib.sha256(json.dumps([settings, shapes], sort_keys=True, default=str).encode()).hexdigest()
