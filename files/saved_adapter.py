"""An adapter in PEFT's format, of a RUN or of PEFT itself: found, and its files checked.

The folder holds adapter_config.json, the settings, and adapter_model.safetensors, the tensors. Only the
header of the latter is read here, and the tensors one at a time.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from files.finite import is_finite
from files.links import points_outside
from files.model_folder import download
from files.names import (
    ADAPTER,
    ADAPTER_CONFIG,
    EXPERT_PARAMETERS,
    OPTIONS,
    TOKENIZER_TEXTS,
    split_revision,
)
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, read_json

PEFT_PREFIX = "base_model.model."  # PEFT's tensor names start with it
ADAPTER_DTYPES = ("F32", "BF16", "F16", "F64")  # safetensors' names
PICKLE = "adapter_model.bin"
# Settings of PEFT's LoraConfig that change what the adapter computes, or what it is put on. Only their UNSET
# values are computed here. Two others are checked elsewhere. target_parameters is compared with the model.
# exclude_modules names the modules of a wrapper that text does not need. If it left out a linear of the
# decoder layers, the file would lack the linear's tensors.
FOREIGN_SETTINGS = (
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    "layer_replication", "lora_bias", "fan_in_fan_out", "trainable_token_indices",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config",
    "kasa_config", "arrow_config", "alora_invocation_tokens", "use_qalora", "use_bdlora", "megatron_config",
)  # fmt: skip
UNSET: tuple = (None, False, [], {})
# Ways to start an adapter that leave the base's weights as they are. Others, such as pissa, change the base.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal")

TensorHeaders = dict[str, tuple[list[int], str]]  # {name: (shape, safetensors' name of the dtype)}


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's folder, its settings and headers checked.

    Attributes:
        name: the folder's absolute path, or owner/name@commit on the hub.
        path: adapter_model.safetensors.
        settings: contents of adapter_config.json.
        metadata: metadata of the safetensors file; a RUN's identifies its base (files/base_model.py).
        tensors: the tensors' headers.
    """

    name: str
    path: Path
    settings: dict
    metadata: dict[str, str]
    tensors: TensorHeaders

    def digest(self) -> str:
        """Return a digest of the tensors' file. Raises OSError."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def open_adapter(name: str) -> SavedAdapter:
    """Find and open the adapter of --adapter: a RUN, a folder, or a hub id, maybe with @revision.

    Raises UserError, which names the option, if there is no adapter or its settings are not supported here.
    """
    local = os.path.expanduser(name)
    if os.path.isdir(local):
        folder = Path(local).resolve()
        pinned = str(folder)
    else:
        folder = download(name, "--adapter", ADAPTER_CONFIG, ADAPTER, OPTIONS, *TOKENIZER_TEXTS)
        pinned = f"{split_revision(name)[0]}@{folder.name}"  # a snapshot is named by its commit
    path = folder / ADAPTER
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"--adapter {name}: holds no adapter (no {ADAPTER_CONFIG})")
    if not path.is_file():
        is_pickle = (folder / PICKLE).is_file()
        hint = f"; {PICKLE} is a pickle, which is never loaded: convert it to safetensors" * is_pickle
        raise UserError(f"--adapter {name}: holds no {ADAPTER}{hint}")
    for file in (path, *(folder / file for file in (ADAPTER_CONFIG, OPTIONS, *TOKENIZER_TEXTS))):
        if points_outside(file):
            raise UserError(f"{file}: is a link out of the folder, to {os.path.realpath(file)}")
    settings = read_json(folder / ADAPTER_CONFIG, MAX_CONFIG_BYTES)
    check_settings(settings, folder / ADAPTER_CONFIG)
    metadata, tensors = read_adapter_header(path)
    return SavedAdapter(pinned, path, settings, metadata, tensors)


def check_settings(settings: dict, path: Path) -> None:
    """Raise UserError for settings of PEFT's that are not computed here, by name.

    settings: contents of adapter_config.json. path: that file.
    """
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type {kind} is not supported; only LORA, which DoRA has too")
    if expert_rank(settings):
        settings = {name: value for name, value in settings.items() if name != "rank_pattern"}
    changed = next((name for name in FOREIGN_SETTINGS if settings.get(name) not in UNSET), None)
    if changed:
        raise UserError(f"{path}: {changed} {settings[changed]} is not supported here")
    if settings.get("bias") not in (None, "none"):
        raise UserError(f"{path}: bias {settings['bias']} is not supported here; only none")
    if settings.get("use_rslora") not in (None, True, False):
        raise UserError(f"{path}: use_rslora {settings['use_rslora']}: must be true or false")
    start = settings.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise UserError(
            f"{path}: init_lora_weights {start} is not supported here: PEFT changes the base's weights for"
            " it; save the adapter with path_initial_model_for_weight_conversion"
        )


def expert_rank(settings: dict) -> int:
    """Return the rank of an adapter on routed experts by its settings; 0 without one, or if they are foreign.

    settings: contents of adapter_config.json. rank_pattern may name only EXPERT_PARAMETERS, with one rank.
    """
    targets, pattern = settings.get("target_parameters") or [], settings.get("rank_pattern") or {}
    if not isinstance(targets, list) or not isinstance(pattern, dict):
        return 0
    if not all(name in targets for name in EXPERT_PARAMETERS) or not pattern.keys() <= {*EXPERT_PARAMETERS}:
        return 0
    rank, other = (pattern.get(name, settings.get("r")) for name in EXPERT_PARAMETERS)
    return rank if type(rank) is int and rank == other and rank > 0 else 0


def read_adapter_header(path: Path) -> tuple[dict[str, str], TensorHeaders]:
    """Return (metadata, headers of the tensors) of an adapter's file. Raises UserError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return metadata, {name: (view.get_shape(), view.get_dtype()) for name, view in slices.items()}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: truncated or not a safetensors file ({e})") from None


def read_adapter_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (PEFT's name, tensor on the CPU) of an adapter's file. Raises UserError for NaN or infinity."""
    for module, tensors in read_adapter_modules(path):
        for key, tensor in tensors.items():
            yield f"{PEFT_PREFIX}{module}.{key}", tensor


def read_adapter_modules(path: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield (module's name, {PEFT's name below it: tensor on the CPU}) of an adapter's file.

    Raises UserError for NaN or infinity.
    """
    with safe_open(path, framework="pt") as f:
        names: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for name in f.keys():  # noqa: SIM118
            module, key = split_name(name)
            names[module][key] = name
        for module, keys in names.items():
            tensors = {key: f.get_tensor(name) for key, name in keys.items()}
            for key, tensor in tensors.items():
                if not is_finite(tensor):
                    raise UserError(f"{path}: is damaged ({keys[key]} holds NaN or infinity)")
            yield module, tensors


def split_name(name: str) -> tuple[str, str]:
    """Split a tensor's name into (module, PEFT's name below it, such as lora_A.weight or weight)."""
    path = name.removeprefix(PEFT_PREFIX)
    module, separator, last = path.rpartition(".lora_")
    if separator:
        return module, f"lora_{last}"
    module, _, last = path.rpartition(".")
    return module, last
