"""How the model of a run takes images, and the options about them."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from data.evaluation_data import EvaluationData
from data.image_format import ImageFormat
from data.rows import TokenizedRows
from models.family import Family
from options.config import Config
from options.errors import UserError


def read_image_format(
    family: Family, model_config: PretrainedConfig, folder: Path, image_size: int | None
) -> ImageFormat | None:
    """Return how a model takes images; None if it takes none.

    Args:
        family: the model's family, with its vision parts if they are built.
        model_config: its config.
        folder: its folder, with the settings of its image processor.
        image_size: --image_size; None = as the folder says.

    Raises UserError for settings that cannot be followed, and a size that the model does not allow.
    """
    vision = family.built_vision()
    if vision is None or vision.read_format is None:
        return None
    image_format: ImageFormat = vision.read_format(model_config, folder)
    return image_format if image_size is None else image_format.limit_side(image_size)


def check_image_options(config: Config, rows: TokenizedRows, evaluation: EvaluationData) -> None:
    """Raise UserError for an option about images if no row, also of the evaluation set, has one."""
    if rows.images.refs or (evaluation.rows and evaluation.rows.images.refs):
        return
    for name in ("image_folder", "image_size"):
        if (value := getattr(config, name)) is not None:
            raise UserError(f"--{name} {value}: has no effect, since no row has an image; leave it out")
