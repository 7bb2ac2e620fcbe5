"""Tensors that config.json calls redundant, compared with what they repeat before they are left out.

There are two kinds: a head that is tied to the embedding, and the rotary frequencies that old Llama files
carry. A head that differs from the embedding is no copy (merges after added tokens leave such files): the
model is then untied, as transformers 5 does, and each config.json that is written says so.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from transformers import PretrainedConfig

from files.comparison import same_values
from files.model_folder import CheckpointFiles
from files.names import CONFIG
from files.tensors import StoredTensor, read_tensor
from files.weight_sets import UnmatchedTensor, two_sets_error
from models.family import ROTARY_TABLE, Family
from models.longrope import ByRow, make_rotary
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, read_json

UNTIED = (
    "config.json ties the head to the embedding, but the files hold a head that differs from it: it is used"
    " as it is, untied"
)
PRECISION = 1e-6  # relative, of frequencies that another library or device computed in fp32


def has_own_head(config: PretrainedConfig, family: Family, files: CheckpointFiles) -> bool:
    """Whether the files hold a head that differs from the embedding that `config` ties it to. Reads both.
    Raises OSError."""
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if not config.tie_word_embeddings or not {head, embedding} <= files.tensors.keys():
        return False
    if {head, embedding} & files.packed.keys():  # one that is packed has been rounded: it repeats nothing
        return True
    return not same_values((files.folder, files.tensors[head]), (files.folder, files.tensors[embedding]))


def name_embedding(config: PretrainedConfig, family: Family, files: CheckpointFiles) -> None:
    """Gives the embedding its name where a tied model's files hold it under the head's name alone, as transformers
    reads it."""
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if config.tie_word_embeddings and head in files.tensors and embedding not in files.tensors:
        files.tensors[embedding] = files.tensors.pop(head)


def as_loaded(raw: dict, config: PretrainedConfig) -> dict:
    """Return `raw`, with tie_word_embeddings as loaded. raw: of a folder's config.json; config: what was
    loaded from there, which may have been untied."""
    if type(config).from_dict(copy.deepcopy(raw)).tie_word_embeddings == config.tie_word_embeddings:
        return raw
    return raw | {"tie_word_embeddings": config.tie_word_embeddings}


def corrected_config(folder: Path, config: PretrainedConfig) -> dict[str, str]:
    """{config.json: its text} with what `as_loaded` makes of the one in `folder`; {} if that may be copied as
    it is. Raises UserError."""
    raw = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
    wanted = as_loaded(raw, config)
    return {} if wanted == raw else {CONFIG: json.dumps(wanted, indent=2) + "\n"}


def check_frequencies(config: PretrainedConfig, family: Family, files: CheckpointFiles) -> None:
    """Raises UserError if the files hold rotary frequencies other than those that `config` gives: the model
    is computed with the latter, by this program as by transformers."""
    stored = [name for name in files.tensors if name.endswith(ROTARY_TABLE)]
    tables = _tables(config, family) if stored else []
    for name in stored:
        if not _is_one_of(tables, files.folder, files.tensors[name]):
            raise UserError(
                f"{files.tensor_origin(name)} holds other rotary frequencies than config.json gives (rope_theta,"
                " rope_scaling), and could not be used: correct config.json, or delete the tensor"
            )


def check_extras(config: PretrainedConfig, family: Family, files: CheckpointFiles) -> None:
    """Raises UserError if one of two sets of weights holds a tensor that the other lacks, unless it is
    redundant: a copy of the embedding that is tied to it, or the rotary frequencies that `config` gives."""
    for extra in files.unmatched:
        if not _is_redundant(extra, config, family, files.folder):
            file = extra.tensors[extra.name].file
            raise two_sets_error(files.folder, f"{extra.name} is in {file}, and not in {extra.missing_from}")


def _is_redundant(extra: UnmatchedTensor, config: PretrainedConfig, family: Family, folder: Path) -> bool:
    stored = extra.tensors[extra.name]
    if not family.ignores(extra.name, config.tie_word_embeddings):
        return False
    if extra.name.endswith(ROTARY_TABLE):
        return stored.torch_dtype.is_floating_point and _is_one_of(_tables(config, family), folder, stored)
    embedding = extra.tensors.get(f"{family.embedding}.weight")
    return embedding is not None and same_values((folder, stored), (folder, embedding))


def _is_one_of(tables: list[torch.Tensor], folder: Path, stored: StoredTensor) -> bool:
    fitting = [table for table in tables if table.shape == stored.shape]
    return bool(fitting) and any(_repeats(read_tensor(folder, stored), table) for table in fitting)


def _tables(config: PretrainedConfig, family: Family) -> list[torch.Tensor]:
    """The frequencies that a model of this config has or had, each [rotated features / 2] fp32."""
    with torch.device("cpu"):
        rotary = make_rotary(family, config)
    tables = [table for name, table in rotary.named_buffers() if name.endswith("inv_freq")]
    if isinstance(rotary, ByRow):
        tables.append(rotary.frequencies_of_long)
    rope = config.rope_parameters
    if rope.get("rope_type") == "linear":  # which transformers 4 applied to positions, not to frequencies
        tables.append(tables[0] * rope["factor"])
    return tables


def _repeats(stored: torch.Tensor, table: torch.Tensor) -> bool:
    """Whether `stored` is `table` as its dtype rounds it, or a 16-bit one that it was converted from."""
    held, computed = stored.double(), table.double()
    for dtype in (stored.dtype, torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        near = (held - computed).abs() <= (info.eps + PRECISION) * computed + info.tiny * info.eps
        if torch.equal(stored.to(dtype).double(), held) and bool(near.all()):
            return True
    return False
