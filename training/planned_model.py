"""A model as a plan needs it: its config and the headers of its weights, which nobody downloads or reads.

It is a folder, a hub id or one of models/shapes.py. A folder or a repository whose headers cannot be had is
planned by its config.json alone: the weights of a run must have exactly the shapes that it says.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from files.config_parts import find_quantization, text_config, weights_dtype
from files.hub_headers import fetch_headers
from files.model_folder import find_model, list_weight_files, read_file_header
from files.names import ADAPTER_CONFIG, CARD, CONFIG, INDEX, SINGLE_FILE
from files.quantized_releases import SIDE_FILES
from files.tensors import StoredTensor
from files.weight_headers import WeightHeaders
from models.family import Family
from models.redundant import is_tied_by_default
from models.registry import build_on_meta, family_of, open_headers, read_config
from models.shapes import IMAGE_SHAPES, SHAPES
from options.config import EMBEDDED_MODELS
from options.errors import UserError

UNKNOWN_LIMIT = 2**17  # tokens of a row of a model whose config names no limit
WEIGHTS = ("*.safetensors", INDEX, "*.bin", "*.pth")  # a folder with none of them has only its config


@dataclass(frozen=True)
class PlannedModel:
    """A model that is known by its config and the headers of its weights.

    Attributes:
        name: as it was given.
        model: transformers' model on meta, unchanged, so that one serves for many options.
        family: the model's family.
        files: its tensors by name, and which of them are packed.
        by_config: whether `files` follow from the config, because there are no headers.
        download: bytes of weights that a run fetches from the hub first; 0 if they are on this disk.
    """

    name: str
    model: PreTrainedModel
    family: Family
    files: WeightHeaders
    by_config: bool = False
    download: int = 0

    @property
    def context_limit(self) -> int:
        """The most tokens of a row that the model was made for."""
        text = text_config(self.model.config)
        return getattr(text, "max_position_embeddings", None) or UNKNOWN_LIMIT


def is_named_shape(model_name: str) -> bool:
    """Return whether a model is planned by one of SHAPES: it has no weights and no tokenizer."""
    is_folder = model_name in EMBEDDED_MODELS or os.path.isdir(os.path.expanduser(model_name))
    return not is_folder and model_name.lower() in SHAPES


def open_planned_model(name: str, images: bool = False) -> PlannedModel:
    """Return the model of that name. Of the hub it fetches config, index and headers, as far as it needs.

    Args:
        name: a folder, a hub id with or without `@revision`, one of EMBEDDED_MODELS, or a key of SHAPES in
            any case. A folder of the same name wins over a shape.
        images: whether it is to take images.

    Raises:
        UserError: it is none of these, is not accessible, is no model to train, or takes no images.
    """
    if is_named_shape(name):
        if images and name.lower() not in IMAGE_SHAPES:
            raise UserError(
                f"--model_name {name}: the shape of a model of text alone; shapes that take images:"
                f" {', '.join(IMAGE_SHAPES)}"
            )
        shape = SHAPES[name.lower()].model_config()
        shape.name_or_path = name  # for messages
        return _plan_by_config(name, Path(name), shape, family_of(shape, images))
    is_folder = name in EMBEDDED_MODELS or os.path.isdir(os.path.expanduser(name))
    try:
        folder = find_model(name, (CONFIG, ADAPTER_CONFIG, INDEX, CARD, *SIDE_FILES))
    except UserError as e:
        if is_folder or "/" in name:
            raise
        raise UserError(f"{e}, and no named shape; these are {', '.join(SHAPES)}") from None
    config, family = read_config(folder, images)
    is_packed = find_quantization(config) is not None
    headers, download = (_read_folder(folder, is_packed), 0) if is_folder else _read_hub(name, folder)
    if headers is None and is_packed:
        raise UserError(
            f"--model_name {name}: is packed by bitsandbytes, and the hub cannot be reached for its headers"
        )
    if headers is None:
        planned = _plan_by_config(name, folder, config, family)
        return planned if is_folder else dataclasses.replace(planned, download=planned.files.data_bytes())
    # `headers` gets the shapes that packed weights had before, so the bytes are counted first.
    model = open_headers(config, family, headers, is_local=headers.folder == folder)
    return PlannedModel(name, model, family, headers, download=download)


def _plan_by_config(name: str, folder: Path, config: PretrainedConfig, family: Family) -> PlannedModel:
    """Return a model whose tensors are those that its config asks for. folder: for messages."""
    if is_tied_by_default(config):
        config.tie_word_embeddings = False
    model = build_on_meta(config, family)
    headers = WeightHeaders(folder)
    dtype = weights_dtype(config) or torch.bfloat16
    found = {
        key: StoredTensor(SINGLE_FILE, tuple(parameter.shape), dtype)
        for key, parameter in model.named_parameters()
    }
    headers.add_file(SINGLE_FILE, found, None)
    return PlannedModel(name, model, family, headers, by_config=True)


def _read_folder(folder: Path, is_packed: bool) -> WeightHeaders | None:
    """Return the headers of a folder's weights; None if it has no weights, and they would not be packed."""
    if not is_packed and not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        return None
    headers = WeightHeaders(folder)
    for file, names in list_weight_files(folder).items():
        headers.add_file(file, read_file_header(folder, file), names)
    return headers


def _read_hub(name: str, folder: Path) -> tuple[WeightHeaders | None, int]:
    """Return (the headers of a hub model, bytes of its weights that are not on this disk).

    The headers come from its snapshot `folder` or the hub; None if neither has them.
    """
    has_list = (folder / INDEX).is_file() or (folder / SINGLE_FILE).is_file()
    files = list_weight_files(folder) if has_list else {SINGLE_FILE: None}
    absent = [file for file in files if not (folder / file).is_file()]
    fetched = fetch_headers(name, folder.name, absent) if absent else {}
    if fetched is None:
        return None, 0
    headers = WeightHeaders(Path(name) if absent else folder)
    for file, names in files.items():
        headers.add_file(file, fetched.get(file) or read_file_header(folder, file), names)
    return headers, headers.data_bytes(absent)
