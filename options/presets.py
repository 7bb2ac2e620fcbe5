"""Presets: values of the options that decide what is learned, for a kind of task (`--preset`).

Each is a TOML file in options/presets/: `use` says when to take it, and `[options]` has a value for each of
PRESET_OPTIONS. docs/recipes.md gives the reasons. The order is: defaults < preset < --config < command line.
config.yaml of a run records the name and every value, so that a later change of a preset changes no run.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from options.config import ADAPTER_OPTIONS, PRESETS, Config
from options.declaration import format_value
from options.errors import UserError
from options.limits import MAX_OPTIONS_BYTES, read_text
from options.resolve import run_folder
from options.run_folders import recorded_run

Read = Callable[[list[str]], dict[str, Any]]  # `Command.read` of train.py, or of a command with its options
FOLDER = Path(__file__).parent / "presets"
PRESET_OPTIONS = (
    "lora_rank", "lora_alpha", "use_rslora", "lora_target_modules", "lora_dropout", "lr", "lr_scheduler",
    "lr_warmup", "num_epochs",
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A preset: its file, when to use it, and its values, {option: value}."""

    path: Path
    use: str
    values: dict[str, Any]

    @property
    def arguments(self) -> list[str]:
        """The values as a command line for train.py has them."""
        return [f"--{name}={format_value(value)}" for name, value in self.values.items()]


def read_preset(name: str, origin: str = "--preset") -> Preset:
    """Return a preset. Raises UserError if there is none of this name, or its file is damaged.

    origin: where the name was given, for the error.
    """
    if name not in PRESETS:
        raise UserError(f"{origin}: {name!r}: must be one of {', '.join(PRESETS)}; see --help_presets")
    path = FOLDER / f"{name}.toml"
    try:
        content = tomllib.loads(read_text(path, MAX_OPTIONS_BYTES))
        use, values = content.pop("use"), content.pop("options")
    except (OSError, ValueError, KeyError) as e:  # ValueError: not TOML
        raise UserError(f"{path}: not a preset ({e})") from None
    if content or set(values) != set(PRESET_OPTIONS):
        raise UserError(f"{path}: a preset has `use`, and [options] with {', '.join(PRESET_OPTIONS)}")
    return Preset(path, use, values)


def describe_presets() -> str:
    """Return the text of --help_presets: when to use each preset, and its values as options."""
    lines = [
        "--preset NAME gives these options values. Those of --config and of the command line win.",
        "docs/recipes.md has the reasons, and what to change if the loss says so.",
    ]
    for name in PRESETS:
        preset = read_preset(name)
        half = len(preset.arguments) // 2
        words = [argument.replace("=", " ") for argument in preset.arguments]
        lines += [f"\n{name}: {preset.use}", *(f"    {' '.join(w)}" for w in (words[:half], words[half:]))]
    return "\n".join(lines)


def describe_preset(config: Config) -> str | None:
    """Return a run's --preset and which of its options had other values in the run; None without a preset.

    Other values come from the command line, --config or --adapter. Of a preset that this version does not
    have, the name is returned.
    """
    if config.preset not in PRESETS:
        return config.preset
    values = read_preset(config.preset).values
    others = [name for name in PRESET_OPTIONS if getattr(config, name) != values[name]]
    return f"{config.preset}, with other values of {', '.join(others)}" if others else config.preset


HELP = (("help_presets", "print the presets, and end", describe_presets),)


def add_preset(
    read: Read, typed: Collection[str], file: str | None, given: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return (the given options and the preset's values for others of PRESET_OPTIONS, the line about them).

    A --adapter decides its own options. config.yaml of a RUN decides all: an option that an older version did
    not record has its default. A run that is resumed has the values that it was started with, even if the
    preset has changed since.

    Args:
        read: reads a command line.
        typed: names of the options on the command line.
        file: the --config file.
        given: the options of both, {name: converted value}.

    Raises UserError for an unknown preset, or one on the command line that has no effect.
    """
    name = given.get("preset")
    if name is None:
        return given, []
    is_of_run = file is not None and recorded_run(file) is not None
    is_typed = "preset" in typed
    if is_of_run and not is_typed:
        return given, []
    preset = read_preset(name, "--preset" if is_typed else f"{file}: preset")
    decided = ADAPTER_OPTIONS if given.get("adapter") is not None else ()
    missing = [option for option in PRESET_OPTIONS if option not in given and option not in decided]
    if missing and not is_of_run:
        return _complete(read, preset, given, missing)
    if is_typed:
        where = f"{file} is a run's, and gives" if is_of_run else _name_sources(file, decided)
        raise UserError(f"--preset {name}: has no effect: {where} all of its options; leave it out")
    return given, []


def _complete(
    read: Read, preset: Preset, given: dict[str, Any], missing: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return what `add_preset` does, of a preset that decides the options in `missing`."""
    name = given["preset"]
    values, origin = _recorded_values(read, given), ", as this run has recorded"
    if values.get("preset") != name:
        origin = ""
        try:
            values = read(preset.arguments)
        except UserError as e:
            raise UserError(f"{preset.path}: {e}") from None
    added = {option: values[option] for option in missing if option in values}
    words = ", ".join(f"{option} {format_value(value)}" for option, value in added.items())
    return given | added, [f"--preset {name}{origin}: {words}"] if added else []


def _name_sources(file: str | None, decided: Collection[str]) -> str:
    """Return the words on what gives all options of a preset.

    file: --config; decided: the options that --adapter gives.
    """
    sources = [*(["--config"] if file else []), *(["--adapter"] if decided else []), "the command line"]
    *others, last = sources
    return f"{', '.join(others)} and {last} give" if others else f"{last} gives"


def _recorded_values(read: Read, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the RUN that --resume continues, by its config.yaml; {} if there is none."""
    resume = given.get("resume")
    if not resume:
        return {}
    folder = given.get("output_dir") or run_folder(resume)
    path = os.path.join(os.path.expanduser(folder or ""), "config.yaml")
    return read(["--config", path]) if folder and os.path.isfile(path) else {}
