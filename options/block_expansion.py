"""Options of block_expansion.py. Errors in them are found before torch and transformers are imported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from options.command_line import Command
from options.declaration import REQUIRED, option
from options.errors import UserError

EXCLUSIVE_OPTIONS = ("new_blocks", "expansion_rate", "after", "blocks")


def parse_layers(text: str) -> list[int]:
    """Return the layer numbers in a text such as 3,7,11. Raises UserError if one is no whole number."""
    layers = []
    for number in map(str.strip, text.split(",")):
        try:
            layers.append(int(number))
        except ValueError:
            raise UserError(f"--after: {number!r} is not the number of a layer") from None
    return layers


@dataclass(frozen=True)
class Options:
    """The options of block_expansion.py. Exactly one of EXCLUSIVE_OPTIONS is given."""

    # fmt: off
    model_name: str = option(REQUIRED, "Model", "folder or hub id of a safetensors model, or toy")
    output_dir: str = option(REQUIRED, "Model", "folder of the new model")
    overwrite: bool = option(False, "Model", "replace the model that output_dir holds")
    new_blocks: int | None = option(None, "One of", "number of new blocks, spread evenly", ge=1)
    expansion_rate: float | None = option(None, "One of", "number of new blocks as a share of the layers,"
        " rounded, at least one: 0.25 = 8 for 32", gt=0)
    after: list[int] | None = option(None, "One of", "a new block after each of these layers, counted from 0:"
        " 3,7,11; a number given twice = two blocks", convert=parse_layers, commas=True)
    blocks: str | None = option(None, "One of", "file of trained blocks to insert into the expanded model"
        " --model_name")
    # fmt: on


COMMAND = Command(
    "block_expansion.py",
    "--model_name MODEL --output_dir FOLDER\n"
    "         (--new_blocks N | --expansion_rate X | --after LAYERS | --blocks FILE) [--overwrite]",
    "Put new layers between the layers of a model, for the Llama-Pro train types.",
    Options,
)


def parse(argv: list[str]) -> Options:
    """Return the options in `argv`. Raises UserError if they are wrong or do not go together.

    Exits with status 0 on --help.
    """
    options = Options(**COMMAND.read(argv))
    if sum(getattr(options, name) is not None for name in EXCLUSIVE_OPTIONS) != 1:
        raise UserError(
            "give one of " + ", ".join(f"--{name}" for name in EXCLUSIVE_OPTIONS) + "; see --help"
        )
    for name in ("model_name", "output_dir"):
        if not getattr(options, name):
            raise UserError(f"--{name} is missing; see --help")
    return replace(options, output_dir=str(Path(options.output_dir).expanduser()))
