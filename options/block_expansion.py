"""block_expansion.py's command line: what can be wrong with it is found here, before torch and transformers are imported."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from options.command_line import command_parser, suggest, with_underscores
from options.errors import UserError


@dataclass(frozen=True)
class Options:
    """The command line. Exactly one of new_blocks, expansion_rate, after and blocks is given."""

    model_name: str
    output_dir: str
    new_blocks: int | None
    expansion_rate: float | None
    after: list[int] | None
    blocks: str | None
    overwrite: bool


def parse(argv: list[str]) -> Options:
    """Raises UserError; exits 0 on --help."""
    parser = command_parser(
        "block_expansion.py",
        "--model_name MODEL --output_dir FOLDER\n"
        "         (--new_blocks N | --expansion_rate X | --after LAYERS | --blocks FILE) [--overwrite]",
        "Put new layers between the layers of a model, for the Llama-Pro train types.",
    )
    for name, metavar, text in (
        ("model_name", "TEXT", "folder or hub id of a safetensors model, or toy"),
        ("output_dir", "TEXT", "folder of the new model"),
        ("new_blocks", "N", "number of new blocks, spread evenly"),
        ("expansion_rate", "X", "the same as a share of the layers, rounded, at least one: 0.25 = 8 for 32"),
        ("after", "LAYERS", "a new block after each of these layers, counted from 0: 3,7,11; twice for two"),
        ("blocks", "FILE", "put these trained blocks into the expanded model --model_name"),
    ):
        parser.add_argument(f"--{name}", metavar=metavar, help=text)
    flag = {
        "nargs": "?",
        "const": "true",
        "default": "false",
        "choices": ("true", "false"),
        "metavar": "BOOL",
    }
    parser.add_argument("--overwrite", help="replace the model that output_dir holds", **flag)
    args, rest = parser.parse_known_args(with_underscores(argv))
    if rest:
        raise UserError(f"unknown option {rest[0]}{suggest(rest[0].split('=')[0], vars(args))}")
    ways = ("new_blocks", "expansion_rate", "after", "blocks")
    if sum(getattr(args, way) is not None for way in ways) != 1:
        raise UserError("give one of " + ", ".join(f"--{way}" for way in ways) + "; see --help")
    for name in ("model_name", "output_dir"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing; see --help")
    return _converted(args)


def _converted(args: argparse.Namespace) -> Options:
    values = vars(args) | {"output_dir": os.path.expanduser(args.output_dir)}
    values["overwrite"] = args.overwrite == "true"
    if args.new_blocks is not None:
        values["new_blocks"] = _number("--new_blocks", args.new_blocks, int, "a whole number")
        if values["new_blocks"] <= 0:
            raise UserError(f"--new_blocks {args.new_blocks}: must be positive")
    if args.expansion_rate is not None:
        values["expansion_rate"] = _number("--expansion_rate", args.expansion_rate, float, "a number")
        if not 0 < values["expansion_rate"] < float("inf"):
            raise UserError(f"--expansion_rate {args.expansion_rate}: must be positive and finite")
    if args.after is not None:
        numbers = args.after.split(",")
        values["after"] = [_number("--after", n.strip(), int, "the number of a layer") for n in numbers]
    return Options(**values)


def _number(option: str, text: str, kind: type, noun: str):
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{option}: {text!r} is not {noun}") from None
