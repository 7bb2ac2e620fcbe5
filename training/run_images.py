"""Whether a run has images (--images), and how its model takes them."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PretrainedConfig

from data.evaluation_data import EvaluationData
from data.image_format import ImageFormat
from data.images import describe_deep_images
from data.row_images import NO_VISION
from data.rows import TokenizedRows
from models.family import Family
from models.registry import family_of
from options.config import FIELDS, Config
from options.errors import UserError, reword_errors


def vision_family(config: Config, model_config: PretrainedConfig, family: Family) -> Family:
    """Return a model's family with its vision parts, if the run has images.

    config: the run's options. The others are from `read_config`, without images.

    Raises UserError, which names the option, for a model that takes no images.
    """
    try:
        return family_of(model_config, images=True) if config.has_images else family
    except UserError as e:
        raise UserError(f"{_name_option(config)}: {e}") from None


def _name_option(config: Config) -> str:
    """Return the option, with its value, that makes the vision parts of the model be loaded."""
    if config.vision_targets not in (None, "none"):
        own = config.adapter is None  # if not, they are the adapter's
        return f"--vision_targets {config.vision_targets}" if own else f"--adapter {config.adapter}"
    return "--vision_bits 4" if config.vision_bits == 4 else f"--images {config.images}"


def read_image_format(
    config: Config, model_config: PretrainedConfig, family: Family, folder: Path
) -> tuple[ImageFormat | None, str]:
    """Return (how the model takes images, at most as large as --image_size; "").

    If it takes none, the result is (None, ""), and (None, why) if its files do not say how, or --images is
    false. That is an error only if a row has an image (`explain_refused_images`): many folders for texts lack
    these files.

    Args:
        config: the run's options.
        model_config, family: from `read_config`.
        folder: the model's.

    Raises UserError if --image_size is not possible.
    """
    if family.vision is None:
        return None, ""
    if config.images == "false":
        return None, "--images false is why"
    try:
        found = family.vision.read_format(model_config, folder)
    except UserError as e:
        return None, str(e)
    return found.limit_side(config.image_size) if config.image_size else found, ""


def explain_refused_images(reason: str) -> AbstractContextManager[None]:
    """Return a context that adds to a UserError about images why the model takes none.

    reason: of `read_image_format`.
    """
    return reword_errors(lambda text: f"{text}; {reason}" if reason and NO_VISION in text else text)


def settle_images(
    config: Config, rows: TokenizedRows, evaluation: EvaluationData
) -> tuple[Config, tuple[str, ...]]:
    """Return (the options with true or false for --images, remarks).

    Raises UserError for an option about images if no row has one, also of the evaluation set, and no prompt.
    """
    if rows.images.refs or evaluation.has_images:
        evaluated = evaluation.rows.images.refs if evaluation.rows else ()
        asked = (ref for prompt in evaluation.prompts for ref in prompt.images)
        remarks = describe_deep_images(itertools.chain(rows.images.refs, evaluated, asked))
        return dataclasses.replace(config, images="true"), remarks
    for name in ("image_folder", "image_size", "images_per_pack"):
        if (value := getattr(config, name)) != FIELDS[name].default:
            raise UserError(f"--{name} {value}: has no effect, since no row has an image; leave it out")
    if config.has_images:
        unused = "no row has an image; the model's vision parts are loaded, and not used"
        return config, (f"{_name_option(config)}: {unused}",)
    return dataclasses.replace(config, images="false"), ()
