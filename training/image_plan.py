"""The images that a plan assumes in its rows: plan.py --images_per_row."""

from __future__ import annotations

from dataclasses import dataclass

from options.config import Config
from options.errors import UserError
from training.planned_model import PlannedModel

COMMON_SIDE = 1024  # pixels, where neither the model nor --image_size says how large images are


@dataclass(frozen=True)
class ImagePlan:
    """The images of a plan's rows.

    Attributes:
        per_row: images of a row.
        side: pixels of the sides of an image, resized.
        tokens: of an image.
    """

    per_row: int
    side: int
    tokens: int

    @property
    def least_tokens(self) -> int:
        """Tokens of a row at least: those of its images, and another one to learn."""
        return self.per_row * self.tokens + 1

    def count(self, config: Config, tokens: int) -> int:
        """Return the images of a sequence of so many tokens; those of a pack fill it, up to its limit."""
        if not config.packing:
            return self.per_row
        fitting = tokens // self.tokens
        limit = config.images_per_pack if config.images_per_pack > 0 else fitting
        return max(self.per_row, min(limit, fitting))

    def pixels(self, config: Config, tokens: int) -> int:
        """Return the pixels of the images of a sequence."""
        return self.count(config, tokens) * self.side**2

    def check_context(self, tokens: int) -> None:
        """Raise UserError if the images of a row leave no room in a context of so many tokens."""
        if tokens < self.least_tokens:
            raise UserError(
                f"--images_per_row {self.per_row}: its images take {self.per_row * self.tokens:,} tokens, and"
                f" a row has at most {tokens:,} (--context_length)"
            )


def assume_images(planned: PlannedModel, config: Config, per_row: int | None) -> ImagePlan | None:
    """Return the images of a plan; None for a run without images.

    Args:
        planned: the model.
        config: the run's options.
        per_row: --images_per_row; None = 1 if the run has images.

    Raises UserError for an --image_size that the model does not take.
    """
    vision = planned.family.built_vision()
    if vision is None:
        return None
    model_config = planned.model.config
    tower = getattr(model_config, vision.config)
    fixed = getattr(tower, "image_size", None)
    if fixed and config.image_size not in (None, fixed):
        raise UserError(
            f"--image_size {config.image_size}: this model takes images of {fixed} x {fixed} pixels; leave it"
            " out"
        )
    unit = tower.patch_size * getattr(tower, "spatial_merge_size", 1)
    n_units = config.image_size // unit if config.image_size else round(COMMON_SIDE / unit)
    side = fixed or max(n_units, 1) * unit
    tokens = getattr(model_config, "mm_tokens_per_image", None) or (side // unit) ** 2
    return ImagePlan(per_row or 1, side, tokens)
