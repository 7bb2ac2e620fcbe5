"""Translations of foreign settings of images: their size, and adapters on the vision parts of a model."""

from __future__ import annotations

import math
import re

from options.foreign import Settings, Translation, is_off
from options.foreign_values import as_number, first, train_type
from options.methods import METHODS

FREEZE_TOWER = ("freeze_vision_tower", "freeze_mm_modules")
OF_ONE_SIZE = "the longest side; a model whose images have one size, such as Gemma 3, does without"


def image_size(given: Settings, _settings: Settings) -> Translation:
    """Translate a size: a number, or a width and a height, of which the longer one counts here."""
    sides = [as_number(side) for side in re.findall(r"[^\s,()[\]]+", next(iter(given.values())))]
    numbers = [side for side in sides if side is not None]
    if not numbers or len(numbers) < len(sides):
        return Translation(note="the model's own size holds")
    return Translation({"image_size": f"{max(numbers):g}"}, OF_ONE_SIZE)


def image_area(given: Settings, _settings: Settings) -> Translation:
    """Translate the most pixels of an image into the side of a square that has as many."""
    pixels = as_number(next(iter(given.values())))
    if not pixels or pixels < 0:
        return Translation(note="the model's own size holds")
    return Translation({"image_size": str(math.isqrt(int(pixels)))}, OF_ONE_SIZE)


def vision_targets(given: Settings, settings: Settings) -> Translation:
    """Translate which vision parts are trained. Those that are not named are frozen, as here by default."""
    trains_tower = any(_says_no(given, name) for name in FREEZE_TOWER)
    trains_tower = trains_tower or not is_off(first(given, "finetune_vision_layers"))
    if not trains_tower and not _says_no(given, "freeze_multi_modal_projector"):
        return Translation(note="the vision parts are frozen by default")
    name = train_type(settings, settings).options.get("train_type", settings.get("train_type", ""))
    if name in METHODS and not METHODS[name].adapter:
        return Translation(note="vision parts are trained by adapters alone: --train_type lora", lost=True)
    return Translation({"vision_targets": "all" if trains_tower else "projector"})


def language_parts(given: Settings, _settings: Settings) -> Translation:
    """Translate which parts of the text model get adapters: all of its linears, unless others are named."""
    if not is_off(first(given, "freeze_language_model")):
        return Translation(note="the text model always gets adapters", lost=True)
    switches = [name for name in given if name != "freeze_language_model"]
    if any(is_off(given[name]) for name in switches):
        return Translation(
            note="--lora_target_modules names the linears that get adapters", lost=True, is_advice=True
        )
    return Translation(note="all linears of the text model get adapters by default")


def _says_no(given: Settings, name: str) -> bool:
    """Whether a switch is given and off; one without a value says nothing."""
    return given.get(name, "").strip().lower() in ("false", "no", "off", "0")
