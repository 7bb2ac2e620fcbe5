"""The model below a run: how a result records it, and whether a folder still holds that model."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from files.digests import digest_contents
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
    contents: digest of rows of the weights, as `digest_contents` makes it.
    """

    name: str
    revision: str | None
    described: str
    contents: str

    def metadata(self) -> dict[str, str]:
        """The digests, for the header of a result's safetensors files."""
        return {DESCRIBED: self.described, CONTENTS: self.contents}

    def digest(self) -> str:
        """Both digests in one text, which checkpoints hold."""
        return f"{self.described}-{self.contents}"


def record_base(recorded_name: str, config: PretrainedConfig, files: CheckpointFiles) -> BaseModel:
    """The record of a model whose weights were checked. recorded_name: as `recorded_name` gives it; config: of the
    model as it is trained. Raises OSError."""
    name, revision = split_revision(recorded_name)
    if name == TOY_MODEL:
        name = str(files.folder.resolve())
    return BaseModel(name, revision, base_digest(config, files), digest_contents(files))


def check_base(
    described: str | None,
    contents: str | None,
    config: PretrainedConfig,
    files: CheckpointFiles,
    what: str,
    option: str,
) -> str:
    """Compares what a result says of its base with the model in `files`.

    Args:
        described, contents: the two digests of the result's `BaseModel`; None where it has none.
        config: of the model in `files`.
        what: the result, for messages.
        option: names another base.

    Returns a line for the user where contents cannot be compared, so that only config and shapes were; else "". Raises
    UserError if it is another model, or the weights are others.
    """
    if described != base_digest(config, files):
        raise UserError(f"{what}: was trained on another model than {files.folder}")
    by_shapes = f"{files.folder} is taken for its base model by config and shapes only"
    if contents is None:
        return f"{what}: an earlier version of this program made it, without a digest of weights; {by_shapes}"
    found = digest_contents(files)
    if ("-" in found) != ("-" in contents):
        kinds = ("in 4 bits", "16 or 32") if "-" in contents else ("in 16 or 32 bits", "4")
        return f"{what}: was trained on weights stored {kinds[0]}, not {kinds[1]}; {by_shapes}"
    if contents != found:
        raise UserError(
            f"{what}: was trained on other weights than those in {files.folder}, which were changed since or are another"
            f" model's; name the model as it was: {option}"
        )
    return ""
