"""The model below a run: how a result records it, and whether a folder still holds that model."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from files.digests import Contents, digest_contents
from files.model_folder import CheckpointFiles, base_digest
from files.names import TOKENIZER, split_revision
from options.config import TOY_MODEL
from options.errors import UserError

# Keys of a result's safetensors metadata.
DESCRIBED, CONTENTS, TOKENIZER_FILES = "base_digest", "base_contents", "base_tokenizer"


@dataclass(frozen=True)
class BaseModel:
    """What a result says of the model that it was trained on.

    name: a hub id, or the absolute path of a folder.
    revision: the hub's commit; None for a folder.
    described: digest of config.json and of the weights' names and shapes.
    contents: digests of rows of the weights.
    tokenizer: digest of the tokenizer's files, as `digest_tokenizer` makes it.
    """

    name: str
    revision: str | None
    described: str
    contents: Contents
    tokenizer: str

    def metadata(self) -> dict[str, str]:
        """The digests, for the header of a result's safetensors files."""
        return {
            DESCRIBED: self.described,
            CONTENTS: self.contents.text(),
            TOKENIZER_FILES: self.tokenizer,
        }

    def digest(self) -> str:
        """The digests of the weights in one text, which checkpoints hold. They compare tokenizers by rows."""
        return f"{self.described}-{self.contents.text()}"


def is_same_base(recorded: str, digest: str) -> bool:
    """Whether a checkpoint belongs to the model of a run.

    Checkpoints of earlier versions hold no digest of packed weights, which then are not compared.

    Args:
        recorded: `BaseModel.digest` in the checkpoint.
        digest: the same of the run's model.
    """
    before, described_before = _parse(recorded)
    now, described = _parse(digest)
    same_packed = before.packed is None or before.packed == now.packed
    return described_before == described and before.plain == now.plain and same_packed


def _parse(digest: str) -> tuple[Contents, str]:
    described, _, contents = digest.partition("-")
    return Contents.parse(contents), described


def record_base(recorded_name: str, config: PretrainedConfig, files: CheckpointFiles) -> BaseModel:
    """The record of a model whose weights were checked. Raises OSError.

    Args:
        recorded_name: as `recorded_name` gives it.
        config: of the model as it is trained.
    """
    name, revision = split_revision(recorded_name)
    if name == TOY_MODEL:
        name = str(files.folder.resolve())
    tokenizer = digest_tokenizer(files.folder)
    return BaseModel(name, revision, base_digest(config, files), digest_contents(files), tokenizer)


def digest_tokenizer(folder: Path) -> str:
    """A digest of the names and bytes of the tokenizer's files in a model's folder, with its chat template.
    Raises OSError."""
    found = {}
    for path in sorted({path for pattern in TOKENIZER for path in folder.glob(pattern) if path.is_file()}):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def tokenizer_remark(metadata: Mapping[str, str], folder: Path) -> str:
    """A line for the user where the tokenizer's files in a base's folder are not those of training; else "",
    also for a result of an earlier version, which does not say what they were. Raises OSError.

    It is no error: a template may be corrected on purpose.

    Args:
        metadata: of the result's safetensors file.
    """
    if metadata.get(TOKENIZER_FILES) in (None, digest_tokenizer(folder)):
        return ""
    return (
        f"{folder}: its tokenizer or chat template is not that of training (files changed since): prompts,"
        " tokens and stops may be others than were trained"
    )


def digest_without_head(config: PretrainedConfig, files: CheckpointFiles, own_head: str) -> str:
    """`BaseModel.digest` as made by earlier versions, which tied a head whatever the files hold. Raises OSError.

    Args:
        config: of the model, untied.
        own_head: the head's tensor in `files`.
    """
    tied, rest = _without_head(config, files, own_head)
    return f"{base_digest(tied, rest)}-{digest_contents(rest).text()}"


def trained_without_head(
    metadata: Mapping[str, str], config: PretrainedConfig, files: CheckpointFiles, own_head: str
) -> bool:
    """Whether an earlier version trained a result on this model without its head. own_head: its tensor
    in `files`; the others as for `check_base`."""
    if CONTENTS in metadata:  # versions that write digests of contents use the head
        return False
    return metadata.get(DESCRIBED) == base_digest(*_without_head(config, files, own_head))


def head_left_out(own_head: str, name: str | Path, option: str | None = None) -> str:
    """What to tell of such a result. name: of the model; option: which names another, where it is refused."""
    told = f"an earlier version of this program trained without {own_head}, which {name} holds"
    remedy = "train again, or name a copy of the model without that tensor"
    return f"{told}; {remedy}: {option}" if option else told


def _without_head(
    config: PretrainedConfig, files: CheckpointFiles, own_head: str
) -> tuple[PretrainedConfig, CheckpointFiles]:
    tied, rest = copy.copy(config), copy.copy(files)
    tied.tie_word_embeddings = True
    rest.tensors = {name: stored for name, stored in files.tensors.items() if name != own_head}
    rest.packed = {name: weight for name, weight in files.packed.items() if name != own_head}
    return tied, rest


def check_base(
    metadata: Mapping[str, str],
    config: PretrainedConfig,
    files: CheckpointFiles,
    what: str,
    option: str,
    own_head: str | None,
) -> str:
    """Compares what a result says of its base with the model in `files`.

    Args:
        metadata: of the result's safetensors file. Where an earlier version of this program wrote no digest
            of config and shapes, the caller knows that these fit.
        config: of the model in `files`.
        what: the result, for messages.
        option: names another base.
        own_head: as `open_weights` returns it for the model.

    Returns a line for the user where contents cannot be compared; else "". Raises UserError if it is another
    model, or the weights are others.
    """
    if own_head and trained_without_head(metadata, config, files, own_head):
        raise UserError(f"{what}: {head_left_out(own_head, files.folder, option)}")
    if metadata.get(DESCRIBED) not in (None, base_digest(config, files)):
        raise UserError(f"{what}: was trained on another model than {files.folder}")
    by_shapes = f"of {files.folder} only the config and tensor shapes could be checked"
    if CONTENTS not in metadata:
        return f"{what}: an earlier version of this program made it, without a digest of weights; {by_shapes}"
    recorded, found = Contents.parse(metadata[CONTENTS]), digest_contents(files)
    if not recorded.comparable_with(found):
        kinds = ("in 4 bits", "16 or 32") if recorded.packed else ("in 16 or 32 bits", "4")
        return f"{what}: was trained on weights stored {kinds[0]}, not {kinds[1]}; {by_shapes}"
    if recorded != found:
        raise UserError(
            f"{what}: was trained on other weights than those in {files.folder}, which were changed since or"
            f" are another model's; name the model as it was: {option}"
        )
    return ""
