"""The model below a run: how a result records it, and whether a folder still holds that model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from files.digests import Contents, digest_contents
from files.model_folder import CheckpointFiles, base_digest
from files.names import split_revision
from options.config import TOY_MODEL
from options.errors import UserError

DESCRIBED, CONTENTS = "base_digest", "base_contents"  # keys of a result's safetensors metadata


@dataclass(frozen=True)
class BaseModel:
    """What a result says of the model that it was trained on.

    name: a hub id, or the absolute path of a folder.
    revision: the hub's commit; None for a folder.
    described: digest of config.json and of the weights' names and shapes.
    contents: digests of rows of the weights.
    """

    name: str
    revision: str | None
    described: str
    contents: Contents

    def metadata(self) -> dict[str, str]:
        """The digests, for the header of a result's safetensors files."""
        return {DESCRIBED: self.described, CONTENTS: self.contents.text()}

    def digest(self) -> str:
        """All digests in one text, which checkpoints hold."""
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
    return BaseModel(name, revision, base_digest(config, files), digest_contents(files))


def check_base(
    metadata: Mapping[str, str], config: PretrainedConfig, files: CheckpointFiles, what: str, option: str
) -> str:
    """Compares what a result says of its base with the model in `files`.

    Args:
        metadata: of the result's safetensors file. Where an earlier version of this program wrote no digest
            of config and shapes, the caller knows that these fit.
        config: of the model in `files`.
        what: the result, for messages.
        option: names another base.

    Returns a line for the user where contents cannot be compared; else "". Raises UserError if it is another
    model, or the weights are others.
    """
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
