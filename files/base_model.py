"""The base model of a run: how a result records it, and whether a folder still holds that model."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from files.digests import WeightsDigest, digest_vision, digest_weights
from files.model_folder import CheckpointFiles, digest_structure
from files.names import TOKENIZER_FILES, split_revision
from options.config import EMBEDDED_MODELS
from options.errors import UserError

# Keys of a result's safetensors metadata.
STRUCTURE_KEY, WEIGHTS_KEY, TOKENIZER_KEY = "base_digest", "base_contents", "base_tokenizer"
VISION_KEY = "base_vision"  # of runs with images


@dataclass(frozen=True)
class BaseModel:
    """A result's record of the model that it was trained on.

    Attributes:
        name: a hub id, or the absolute path of a folder.
        revision: the hub's commit; None for a folder.
        structure_digest: digest of config.json and of the weights' names and shapes.
        weights_digest: digests of rows of the weights.
        tokenizer_digest: digest of the tokenizer's files, by `digest_tokenizer`.
        vision_digest: digest of rows of the vision parts' weights; "" if the model is built without them. The
            other digests are those of the text model, so that an adapter of texts can go on with images.
    """

    name: str
    revision: str | None
    structure_digest: str
    weights_digest: WeightsDigest
    tokenizer_digest: str
    vision_digest: str = ""

    def metadata(self) -> dict[str, str]:
        """Return the digests for the header of a result's safetensors files."""
        return {
            STRUCTURE_KEY: self.structure_digest,
            WEIGHTS_KEY: self.weights_digest.text(),
            TOKENIZER_KEY: self.tokenizer_digest,
        } | ({VISION_KEY: self.vision_digest} if self.vision_digest else {})

    def digest(self) -> str:
        """Return the digests of structure, vision parts and weights as one text, for checkpoints.

        Checkpoints compare tokenizers by the digest of the rows.
        """
        structure = self.structure_digest
        if self.vision_digest:
            structure = hashlib.sha256(f"{structure} {self.vision_digest}".encode()).hexdigest()
        return f"{structure}-{self.weights_digest.text()}"


def is_same_base(recorded: str, digest: str) -> bool:
    """Return whether a checkpoint's `BaseModel.digest` and that of a run mean the same base model.

    Checkpoints of earlier versions hold no digest of packed weights; these are then not compared.

    Args:
        recorded: `BaseModel.digest` in the checkpoint.
        digest: `BaseModel.digest` of the run's model.
    """
    old_weights, old_structure = _parse(recorded)
    weights, structure = _parse(digest)
    same_packed = old_weights.packed is None or old_weights.packed == weights.packed
    return old_structure == structure and old_weights.plain == weights.plain and same_packed


def _parse(digest: str) -> tuple[WeightsDigest, str]:
    structure, _, weights = digest.partition("-")
    return WeightsDigest.parse(weights), structure


def record_base(pinned_name: str, config: PretrainedConfig, files: CheckpointFiles) -> BaseModel:
    """Return the `BaseModel` of a run: its model's name, commit and digests. Raises OSError.

    Args:
        pinned_name: result of `pin_model_name`.
        config: the model's config as it is trained.
        files: the model's folder.
    """
    name, revision = split_revision(pinned_name)
    if name in EMBEDDED_MODELS:
        name = str(files.folder.resolve())
    tokenizer = digest_tokenizer(files.folder)
    digests = digest_structure(config, files), digest_weights(files), tokenizer, digest_vision(files)
    return BaseModel(name, revision, *digests)


def digest_tokenizer(folder: Path) -> str:
    """Return a digest of the names and bytes of a folder's tokenizer and chat template files.

    Raises OSError.
    """
    paths = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    digests = {}
    for path in sorted(paths):
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def tokenizer_remark(metadata: Mapping[str, str], folder: Path) -> str:
    """Return a remark if a base's tokenizer files changed since training, else "". Raises OSError.

    A change is no error, since a template may be corrected on purpose. Results of earlier versions record no
    tokenizer, so they get no remark.

    Args:
        metadata: metadata of the result's safetensors file.
        folder: the base's folder.
    """
    if metadata.get(TOKENIZER_KEY) in (None, digest_tokenizer(folder)):
        return ""
    return (
        f"{folder}: its tokenizer or chat template has changed since training: prompts, tokens and stop"
        " tokens may differ from those of training"
    )


def digest_without_head(config: PretrainedConfig, files: CheckpointFiles, untied_head: str) -> str:
    """Return the `BaseModel.digest` that earlier versions made of a model: as if its files held no head.

    Raises OSError.

    Args:
        config: the model's config, untied.
        files: the model's folder.
        untied_head: name of the head's tensor in `files`.
    """
    tied, rest = _remove_head(config, files, untied_head)
    return f"{digest_structure(tied, rest)}-{digest_weights(rest).text()}"


def trained_without_head(
    metadata: Mapping[str, str], config: PretrainedConfig, files: CheckpointFiles, untied_head: str
) -> bool:
    """Return whether a result was trained on this model by an earlier version, which ignored its head.

    Args:
        metadata: metadata of the result's safetensors file.
        config: the model's config, untied.
        files: the model's folder.
        untied_head: name of the head's tensor in `files`.
    """
    if WEIGHTS_KEY in metadata:  # versions that write digests of weights use the head
        return False
    return metadata.get(STRUCTURE_KEY) == digest_structure(*_remove_head(config, files, untied_head))


def no_head_message(untied_head: str, model: str | Path, option: str | None = None) -> str:
    """Return the message that an earlier version trained a result without the model's head.

    Args:
        untied_head: name of the head's tensor.
        model: name or folder of the model that holds it.
        option: if the result is refused, the option that names another model.
    """
    problem = f"an earlier version of this program trained without {untied_head}, which {model} holds"
    remedy = "train again, or name a copy of the model without that tensor"
    return f"{problem}; {remedy}: {option}" if option else problem


def _remove_head(
    config: PretrainedConfig, files: CheckpointFiles, untied_head: str
) -> tuple[PretrainedConfig, CheckpointFiles]:
    """Return copies of `config`, tied, and of `files` without the head."""
    tied, rest = copy.copy(config), copy.copy(files)
    tied.tie_word_embeddings = True
    rest.tensors = {name: stored for name, stored in files.tensors.items() if name != untied_head}
    rest.packed = {name: weight for name, weight in files.packed.items() if name != untied_head}
    return tied, rest


def check_base(
    metadata: Mapping[str, str],
    config: PretrainedConfig,
    files: CheckpointFiles,
    result: str,
    option: str,
    untied_head: str | None,
) -> str:
    """Raise UserError unless a result was trained on the model in `files`.

    Return a remark if weights could not be compared, else "".

    Args:
        metadata: metadata of the result's safetensors file. If an earlier version of this program wrote no
            digest of config and shapes, the caller has checked that they fit.
        config: config of the model in `files`.
        files: the folder of the supposed base.
        result: name of the result, for messages.
        option: the option that names another base.
        untied_head: name of the head's tensor in `files`; None if the head is tied.

    Raises:
        UserError: it is another model, or its weights differ.
        OSError: a file of weights cannot be read.
    """
    if untied_head and trained_without_head(metadata, config, files, untied_head):
        raise UserError(f"{result}: {no_head_message(untied_head, files.folder, option)}")
    if metadata.get(STRUCTURE_KEY) not in (None, digest_structure(config, files)):
        raise UserError(f"{result}: was trained on another model than {files.folder}")
    by_shapes = f"of {files.folder} only the config and tensor shapes could be checked"
    if WEIGHTS_KEY not in metadata:
        return (
            f"{result}: an earlier version of this program made it, without a digest of weights; {by_shapes}"
        )
    recorded, found = WeightsDigest.parse(metadata[WEIGHTS_KEY]), digest_weights(files)
    if not recorded.is_comparable_with(found):
        kinds = ("in 4 bits", "16 or 32") if recorded.packed else ("in 16 or 32 bits", "4")
        return f"{result}: was trained on weights stored {kinds[0]}, not {kinds[1]}; {by_shapes}"
    if recorded != found:
        raise UserError(
            f"{result}: was trained on other weights than those in {files.folder}, which have changed or"
            f" belong to another model; name the original model with {option}"
        )
    if files.vision and metadata.get(VISION_KEY) not in (None, digest_vision(files)):
        raise UserError(
            f"{result}: was trained with a vision tower that has other weights than that in {files.folder};"
            f" name the original model with {option}"
        )
    return ""
