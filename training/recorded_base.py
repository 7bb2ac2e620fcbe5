"""The base of an adapter of PEFT, which records its name alone: whether it plainly is another model."""

from __future__ import annotations

import os
import re
from pathlib import Path

from transformers import PretrainedConfig

from files.digests import digest_weights
from files.model_folder import CheckpointFiles, digest_structure
from files.names import CONFIG, split_revision
from models.registry import open_weights, read_config
from options.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
PACKED_COPY = re.compile(r"-bnb-4bit$", re.IGNORECASE)  # as unsloth names its copies of models


def check_recorded_base(
    settings: dict, base_name: str, config: PretrainedConfig, files: CheckpointFiles, where: str
) -> str:
    """Return a remark if it is not known whether an adapter's recorded base is the run's model, else "".

    Raises UserError if the recorded folder holds another model, or if two names on the hub differ.

    Args:
        settings: contents of adapter_config.json, whose values may be of any type.
        base_name: the run's model, by `pin_model_name`.
        config: its config.
        files: its weights.
        where: names the adapter.
    """
    recorded, (name, commit) = settings.get("base_model_name_or_path"), split_revision(base_name)
    unknown = f"{where}: names {recorded} as its base, not {name}; only the tensors' shapes could be compared"
    if not isinstance(recorded, str) or not recorded:
        return unknown
    folder = Path(os.path.expanduser(recorded))
    if os.path.isdir(folder):
        if recorded == name or os.path.realpath(folder) == os.path.realpath(files.folder):
            return ""
        return _compare_folders(folder, config, files, where, unknown)
    if recorded.casefold() == name.casefold():
        revision = settings.get("revision")
        if not isinstance(revision, str) or not COMMIT.fullmatch(revision) or revision == commit:
            return ""
        return f"{where}: was trained on commit {revision} of {name}, not {commit}; the weights may differ"
    are_ids = HUB_ID.fullmatch(recorded) and HUB_ID.fullmatch(name) and not os.path.isdir(name)
    if not are_ids or files.prequantized or PACKED_COPY.search(recorded) or PACKED_COPY.search(name):
        return unknown
    raise UserError(
        f"{where}: was trained on {recorded}, not on {name}; name that model with --model_name, or a folder"
        " with a copy of it"
    )


def _compare_folders(
    folder: Path, config: PretrainedConfig, files: CheckpointFiles, where: str, unknown: str
) -> str:
    """Return `unknown` if the recorded folder cannot be compared with the run's model, "" if it is equal.

    Raises UserError if it is another model. folder: the recorded folder; the others as above.
    """
    if not (folder / CONFIG).is_file():
        return unknown
    try:
        recorded_config, family = read_config(folder)
        recorded_files = open_weights(folder, recorded_config, family)[0]
        recorded_weights, weights = digest_weights(recorded_files), digest_weights(files)
    except (UserError, OSError):  # an unfinished download, a family that is not known here
        return unknown
    if not recorded_weights.is_comparable_with(weights):
        return unknown
    same_structure = digest_structure(recorded_config, recorded_files) == digest_structure(config, files)
    if same_structure and recorded_weights == weights:
        return ""
    what = "other weights than" if same_structure else "another model than"
    raise UserError(
        f"{where}: was trained on {what} {files.folder}: on {folder}; name that model with --model_name"
    )
