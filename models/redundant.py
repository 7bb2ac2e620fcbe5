"""Compare the tensors that config.json calls redundant with what they repeat, before they are skipped.

There are two kinds: a head that is tied to the embedding, and the rotary frequencies that old Llama files
hold. A head that differs from the embedding is no copy (merges after added tokens leave such files). Then the
model is untied, as in transformers 5, and each config.json that is written says so.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from transformers import PretrainedConfig

from files.comparison import same_values
from files.config_parts import find_quantization, text_config, without_quantization
from files.model_folder import CheckpointFiles
from files.names import CONFIG
from files.tensors import StoredTensor, read_tensor
from files.weight_headers import WeightHeaders
from files.weight_sets import UnmatchedTensor, two_sets_error
from models.family import ROTARY_TABLE, Family
from models.longrope import PerRowLongRope, make_rotary
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, read_json

UNTIED = (
    "config.json ties the head to the embedding, but the files hold a head that differs from it: it is used"
    " as it is, untied"
)
TOLERANCE = 1e-6  # relative, for frequencies that another library or device computed in fp32


def has_untied_head(
    config: PretrainedConfig, family: Family, files: WeightHeaders, max_elements: int | None = None
) -> bool:
    """Return whether `config` ties head and embedding, but the files hold both, and they differ.

    Reads both, or only their first elements. Raises OSError.

    Args:
        config: the model's.
        family: the model's family.
        files: the model's weights, in a folder.
        max_elements: how many elements are compared; None = all.
    """
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if not config.tie_word_embeddings or not {head, embedding} <= files.tensors.keys():
        return False
    if {head, embedding} & files.packed.keys():  # a packed weight was rounded, so it repeats nothing
        return True
    a, b = ((files.folder, files.tensors[name]) for name in (head, embedding))
    return not same_values(a, b, max_elements)


def is_tied_by_default(config: PretrainedConfig) -> bool:
    """Return whether a wrapper's config ties head and embedding, and its text_config does not.

    transformers 4 followed text_config, and such a config.json leaves the wrapper's value to its default
    (Mistral Small 3). transformers 5 ties them, unless the files hold both and they differ.
    """
    return config.tie_word_embeddings and not text_config(config).tie_word_embeddings


def rename_tied_head(config: PretrainedConfig, family: Family, files: WeightHeaders) -> None:
    """Rename the head to the embedding in files.tensors if `config` ties them and only the head is there."""
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if config.tie_word_embeddings and head in files.tensors and embedding not in files.tensors:
        files.tensors[embedding] = files.tensors.pop(head)


def sync_tied_embeddings(raw: dict, config: PretrainedConfig) -> dict:
    """Return `raw`, the contents of a config.json, with the tie_word_embeddings of `config`.

    It is `raw` itself if they agree. config: loaded from there, and maybe untied since. Without a
    quantization_config, that of `raw` is removed: the weights are MXFP4, which is written as 16 bits.
    """
    if not find_quantization(config):
        raw = without_quantization(raw) if find_quantization(raw) else raw
    if type(config).from_dict(copy.deepcopy(raw)).tie_word_embeddings == config.tie_word_embeddings:
        return raw
    return raw | {"tie_word_embeddings": config.tie_word_embeddings}


def corrected_config(folder: Path, config: PretrainedConfig) -> dict[str, str]:
    """Return {"config.json": its text as `sync_tied_embeddings` makes it}; {} if the folder's file agrees.

    Raises UserError if that file cannot be read.
    """
    raw = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
    corrected = sync_tied_embeddings(raw, config)
    return {} if corrected == raw else {CONFIG: json.dumps(corrected, indent=2) + "\n"}


def check_rotary_frequencies(config: PretrainedConfig, family: Family, files: CheckpointFiles) -> None:
    """Raise UserError if the files hold rotary frequencies other than those of `config`.

    The model is computed with those of `config`, here and in transformers.
    """
    stored = [name for name in files.tensors if name.endswith(ROTARY_TABLE)]
    tables = _rotary_tables(config, family) if stored else []
    for name in stored:
        if not _repeats_any(tables, files.folder, files.tensors[name]):
            raise UserError(
                f"{files.tensor_origin(name)} holds other rotary frequencies than config.json gives"
                " (rope_theta, rope_scaling), and could not be used: correct config.json, or delete the"
                " tensor"
            )


def check_extra_tensors(config: PretrainedConfig, family: Family, files: CheckpointFiles) -> None:
    """Raise UserError if a folder has two sets of weights, and a needed tensor is in only one of them.

    Not needed are a copy of the embedding that is tied to it, and the rotary frequencies of `config`.
    """
    for extra in files.unmatched:
        if not _is_redundant(extra, config, family, files.folder):
            file = extra.tensors[extra.name].file
            raise two_sets_error(files.folder, f"{extra.name} is in {file}, and not in {extra.missing_from}")


def _is_redundant(extra: UnmatchedTensor, config: PretrainedConfig, family: Family, folder: Path) -> bool:
    """Return whether an extra tensor repeats the embedding or the rotary frequencies of `config`."""
    stored = extra.tensors[extra.name]
    if not family.is_redundant(extra.name, config.tie_word_embeddings):
        return False
    if extra.name.endswith(ROTARY_TABLE):
        is_float = stored.torch_dtype.is_floating_point
        return is_float and _repeats_any(_rotary_tables(config, family), folder, stored)
    embedding = extra.tensors.get(f"{family.embedding}.weight")
    return embedding is not None and same_values((folder, stored), (folder, embedding))


def _repeats_any(tables: list[torch.Tensor], folder: Path, stored: StoredTensor) -> bool:
    """Return whether a stored tensor equals a table up to rounding; reads it only if a shape matches."""
    candidates = [table for table in tables if table.shape == stored.shape]
    return bool(candidates) and any(_repeats(read_tensor(folder, stored), table) for table in candidates)


def _rotary_tables(config: PretrainedConfig, family: Family) -> list[torch.Tensor]:
    """Return all rotary tables that files of this config may hold: [rotated features / 2] fp32 each."""
    with torch.device("cpu"):
        rotary = make_rotary(family, config)
    tables = [table for name, table in rotary.named_buffers() if name.endswith("inv_freq")]
    if isinstance(rotary, PerRowLongRope):
        tables.append(rotary.long_inv_freq)
    rope = text_config(config).rope_parameters
    if rope.get("rope_type") == "linear":  # transformers 4 divided the positions instead of the frequencies
        tables.append(tables[0] * rope["factor"])
    return tables


def _repeats(stored: torch.Tensor, table: torch.Tensor) -> bool:
    """Return whether `stored` equals `table` up to rounding to stored's dtype, fp16 or bf16."""
    values, computed = stored.double(), table.double()
    for dtype in (stored.dtype, torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        is_near = (values - computed).abs() <= (info.eps + TOLERANCE) * computed + info.tiny * info.eps
        if torch.equal(stored.to(dtype).double(), values) and bool(is_near.all()):
            return True
    return False
