"""The command line and the YAML file: options as text become a `Config`, and errors become one line.

Nothing here needs torch or transformers, whose import takes seconds: wrong options and --help are answered at
once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path

import yaml

from options.config import FIELDS, HINTS, NEEDS, Config, shown
from options.errors import UserError
from options.limits import OPTIONS_FILE, read_text
from options.resolve import resolve


def _annotation(name: str) -> tuple[type, bool]:
    """(int, float, bool or str; whether None is allowed) of an option."""
    hint = HINTS[name]
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None)), True
    return hint, False


def _convert(name: str, value, where: str):
    """value, a string or a YAML scalar, as the option's type. Raises UserError that names `where`."""
    kind, optional = _annotation(name)
    meta = FIELDS[name].metadata
    if value is None and optional:
        return None
    text = str(value).strip()
    try:
        if kind is bool:
            result = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        elif isinstance(value, bool | list | dict) or value is None:
            raise ValueError
        else:
            result = kind(text) if kind is not str else str(value)
    except (ValueError, KeyError):
        noun = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
        raise UserError(f"{where}: {text!r} is not {noun}") from None
    if kind is float and result != result:
        raise UserError(f"{where}: nan is not a number to train with")
    if meta["choices"] and result not in meta["choices"]:
        raise UserError(f"{where}: {result!r} is none of {', '.join(meta['choices'])}")
    return result


class Parser(argparse.ArgumentParser):
    """argparse with errors as UserErrors."""

    def error(self, message):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if value == [] and name != "runs":  # what argparse makes of `--name=--`
                raise UserError(f"--{name}: expected a value")
        return found, rest


def command_parser(program: str, usage: str, description: str) -> Parser:
    """The parser of a command beside train.py; usage: what follows `python <program>`."""
    return Parser(
        prog=program,
        usage=f"python {program} {usage}",
        allow_abbrev=False,
        description=description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )


def _parser() -> Parser:
    parser = Parser(
        prog="train.py",
        usage="python train.py [--option value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Fine-tune a language model too big for one GPU. Without options: a small demo run.",
        epilog="Options may be written with - for _, and switches without `true`.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=110),
    )
    parser.add_argument("--config", metavar="YAML", help="read options from this file; the command line wins")
    groups = {}
    for field in FIELDS.values():
        meta, (kind, _) = field.metadata, _annotation(field.name)
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        flag = {"nargs": "?", "const": "true"} if kind is bool else {}
        metavar = "NAME" if meta["choices"] else {bool: "BOOL", int: "N", float: "X", str: "TEXT"}[kind]
        groups[meta["group"]].add_argument(f"--{field.name}", metavar=metavar, help=_help(field), **flag)
    return parser


def _help(field: dataclasses.Field) -> str:
    meta = field.metadata
    text = meta["help"]
    if meta["choices"]:
        text += f": {', '.join(meta['choices'])}"
    text += f" [{shown(field.default)}]"
    if meta["needs"]:
        text += f" (only for {NEEDS[meta['needs']]})"
    return text.replace("%", "%%")


def suggest(name: str, known: Iterable[str] = FIELDS) -> str:
    """The end of an error line about an unknown option."""
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    return f"; did you mean --{near[0]}?" if near else "; see --help"


def _read_yaml(path: str) -> dict:
    try:
        text = read_text(Path(path), OPTIONS_FILE)
        _check_flat(text, path)
        given = yaml.safe_load(text)
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a UTF-8 text") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name, or a date that no calendar has
        reason = getattr(e, "strerror", None) or f"not YAML ({e})"
        raise UserError(f"--config {path}: {reason}") from None
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ArithmeticError) as e:
        # The last four are what its constructors raise for an explicit tag whose value is not of its kind.
        line = f" line {e.problem_mark.line + 1}" if getattr(e, "problem_mark", None) else ""
        raise UserError(f"--config {path}:{line} is not YAML ({getattr(e, 'problem', e)})") from None
    if not isinstance(given, dict):
        raise UserError(f"--config {path}: expected lines of `option: value`")
    values = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in FIELDS:
            raise UserError(f"--config {path}: unknown option {key}{suggest(str(key))}")
        if value is not None:  # a null line is an option that was not given
            values[name] = _convert(name, value, f"{path}: {name}")
    return values


def _check_flat(text: str, path: str) -> None:
    """Raises UserError for more than lines of `option: value` or lists of values: an alias or a merge stands for as
    much as its writer likes, and depth costs the stack."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"--config {path}: line {event.start_mark.line + 1}: aliases (*) are not read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 2:
            line = event.start_mark.line + 1
            raise UserError(f"--config {path}: line {line}: nested; expected lines of `option: value`")


def with_underscores(argv: list[str]) -> list[str]:
    """--train-type=x -> --train_type=x; values stay as they are."""
    dashes = re.compile(r"--[a-z][a-z0-9-]*")
    return [
        dashes.sub(lambda m: "--" + m[0][2:].replace("-", "_"), a, count=1) if dashes.match(a) else a
        for a in argv
    ]


def parse(argv: list[str]) -> tuple[Config, list[str]]:
    """(the resolved configuration, remarks to print once). Raises UserError; exits 0 on --help."""
    args, rest = _parser().parse_known_args(with_underscores(argv))
    if rest:
        raise UserError(f"unknown option {rest[0]}{suggest(rest[0].split('=')[0])}")
    raw = vars(args)
    given = _read_yaml(raw.pop("config")) if "config" in raw else {}
    given |= {name: _convert(name, value, f"--{name}") for name, value in raw.items()}
    return resolve(given)


def report_folder(argv: list[str]) -> Path:
    """The RUN of report.py's command line. Exits 0 on --help, 2 if there is none."""
    parser = argparse.ArgumentParser(
        prog="report.py", description="Makes RUN/report.html out of a RUN's files."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the --output_dir of a run of train.py")
    return parser.parse_args(argv).run.expanduser()
