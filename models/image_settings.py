"""Read from a model's folder how images become its tokens and pixels.

transformers 4 wrote the settings of the pixels to preprocessor_config.json, transformers 5 writes them into
processor_config.json. A setting that is missing or null has the default of transformers' class. The ids of
the images' tokens are those of config.json, from which the model knows them, too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.image_sizes import FixedImages, PatchImages
from files.names import CONFIG, PROCESSOR_FILES
from files.tokenizer import read_tokenizer
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, read_json

PREPROCESSOR, PROCESSOR = PROCESSOR_FILES
DONE = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
NOT_DONE = ("do_pan_and_scan", "do_center_crop", "do_pad")
MAX_SIDE, MAX_PIXELS = 2**13, 2**26  # of a resized image
FILTERS = range(6)  # PIL's


class ImageSettings:
    """The settings of a model's image processor.

    Args:
        folder: the model's.
        defaults: transformers' class of the processor.

    Raises UserError if they cannot be read, are those of another class, or ask for what is not done here.
    """

    def __init__(self, folder: Path, defaults: type):
        self.defaults = defaults
        self.processor = self._read(folder / PROCESSOR)
        nested = self.processor.get("image_processor")
        self.path = folder / (PROCESSOR if isinstance(nested, dict) else PREPROCESSOR)
        if not self.path.is_file():
            raise UserError(f"{folder}: has no {PREPROCESSOR}, so how its images become pixels is unknown")
        self.values = nested if isinstance(nested, dict) else self._read(self.path)
        self._check_kind()

    @staticmethod
    def _read(path: Path) -> dict:
        return read_json(path, MAX_CONFIG_BYTES) if path.is_file() else {}

    def _check_kind(self) -> None:
        """Raise UserError for another processor, or for steps that are not those of this program."""
        name = self.defaults.__name__.removesuffix("Pil")
        kind = str(self.values.get("image_processor_type", name)).removesuffix("Fast").removesuffix("Pil")
        if kind != name:
            raise self.error("image_processor_type", f"{name} is read here")
        for step in DONE:
            if self.get(step) is False:
                raise self.error(step, "only true is supported")
        for step in NOT_DONE:
            if self.get(step):
                raise self.error(step, "only false is supported")
        factor = self.get("rescale_factor")
        if factor is not None and not (isinstance(factor, float) and math.isclose(factor, 1 / 255)):
            raise self.error("rescale_factor", "only 1/255 is supported")

    def get(self, name: str) -> Any:
        """Return a setting, or its default; None if it has neither."""
        value = self.values.get(name)
        return getattr(self.defaults, name, None) if value is None else value

    def error(self, name: str, right: str) -> UserError:
        """Return a UserError about a setting. right: what would be right."""
        return UserError(f"{self.path}: {name} is {self.values.get(name)!r:.80}; {right}")

    def whole_number(self, name: str, most: int, value: Any = None) -> int:
        """Return a setting between 1 and `most`. value: of a part of it; None = the setting."""
        value = self.get(name) if value is None else value
        if type(value) is not int or not 1 <= value <= most:
            raise self.error(name, f"it must be a whole number from 1 to {most:,}")
        return value

    def channels(self, name: str) -> tuple[float, float, float]:
        """Return a setting of three finite numbers, one a channel. They are not zero for a `std`."""
        value = self.get(name)
        is_list = isinstance(value, list | tuple) and len(value) == 3
        if not is_list or not all(type(x) in (int, float) and math.isfinite(x) for x in value):
            raise self.error(name, "it must be three numbers")
        if name.endswith("std") and 0 in value:
            raise self.error(name, "none of the three may be 0")
        red, green, blue = map(float, value)
        return red, green, blue

    def filter(self) -> int:
        """Return PIL's number of the filter that resizes."""
        value = self.get("resample")
        if isinstance(value, bool) or value not in FILTERS:
            raise self.error("resample", f"it must be PIL's number of a filter, 0 to {FILTERS[-1]}")
        return int(value)

    def match(self, name: str, own: int, config_name: str, config_value: Any) -> None:
        """Raise UserError if a setting contradicts the model's config.json."""
        if own != config_value:
            raise UserError(
                f"{self.path}: {name} is {own}, but {CONFIG} says {config_name} {config_value}: they do not"
                " belong together"
            )


def read_fixed_images(config: PretrainedConfig, folder: Path) -> FixedImages:
    """Return how Gemma 3 takes images. config: the wrapper's. Raises UserError."""
    settings = ImageSettings(folder, Gemma3ImageProcessorPil)
    size = settings.get("size")
    sides = [size.get(key) for key in ("height", "width")] if isinstance(size, dict) else [None]
    side = settings.whole_number("size", MAX_SIDE, sides[0] or -1)
    if sides != [side, side]:
        raise settings.error("size", "its height and width must be equal")
    settings.match("size", side, "image_size of vision_config", config.vision_config.image_size)
    n_tokens = config.mm_tokens_per_image
    length = settings.processor.get("image_seq_length") or settings.values.get("image_seq_length") or n_tokens
    settings.match("image_seq_length", length, "mm_tokens_per_image", n_tokens)
    begin, token, end = _read_tokens(
        config, folder, "boi_token_index", "image_token_index", "eoi_token_index"
    )
    return FixedImages(
        placeholder=begin,
        token_id=config.image_token_index,
        reserved=(begin, token, end),
        mean=settings.channels("image_mean"),
        std=settings.channels("image_std"),
        text=f"\n\n{begin}{token * n_tokens}{end}\n\n",
        n_tokens=n_tokens,
        side=side,
        resample=settings.filter(),
    )


def read_patch_images(config: PretrainedConfig, folder: Path) -> PatchImages:
    """Return how Qwen2-VL, Qwen2.5-VL and Qwen3-VL take images. config: the wrapper's. Raises UserError."""
    settings, vision = ImageSettings(folder, Qwen2VLImageProcessorPil), config.vision_config
    size = settings.get("size")
    size = size if isinstance(size, dict) else {}
    bounds = [
        settings.whole_number("size", MAX_PIXELS, settings.values.get(name) or size.get(key) or -1)
        for name, key in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    ]
    if bounds[0] > bounds[1]:
        raise settings.error("size", "its shortest_edge must not be above its longest_edge")
    shape = {}
    for name, config_name in (
        ("patch_size", "patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):
        shape[name] = settings.whole_number(name, MAX_SIDE)
        settings.match(name, shape[name], f"{config_name} of vision_config", getattr(vision, config_name))
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    begin, token, end, video = _read_tokens(config, folder, *names)
    return PatchImages(
        placeholder=f"{begin}{token}{end}",
        token_id=config.image_token_id,
        reserved=(begin, token, end, video),
        mean=settings.channels("image_mean"),
        std=settings.channels("image_std"),
        wrapped_token=(begin, token, end),
        patch=shape["patch_size"],
        merge=shape["merge_size"],
        frames=shape["temporal_patch_size"],
        min_pixels=bounds[0],
        max_pixels=bounds[1],
        resample=settings.filter(),
    )


def _read_tokens(config: PretrainedConfig, folder: Path, *names: str) -> list[str]:
    """Return the texts of special tokens whose ids config.json has by these names. Raises UserError."""
    added = read_tokenizer(folder, str(folder)).added_tokens_decoder
    texts = []
    for name in names:
        token_id = getattr(config, name, None)
        if token_id not in added:
            raise UserError(
                f"{folder / CONFIG}: {name} is {token_id!r}, which is no special token of the tokenizer; it"
                " belongs to a model that takes images"
            )
        texts.append(added[token_id].content)
    return texts
