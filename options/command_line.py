"""Command lines and YAML files as options: the same reading, conversion, checks and errors for every command.

Nothing here needs torch or transformers, whose import takes seconds: wrong options and --help are answered at
once.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from options.declaration import REQUIRED, options_of, shown
from options.errors import UserError
from options.methods import NEEDS
from options.yaml_file import Value, read_options_file

TRUTHS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}
NOUNS = {bool: "true or false", int: "a whole number", float: "a number"}
METAVARS = {bool: "BOOL", int: "N", float: "X", Path: "PATH"}
LARGEST = 2**31  # of whole numbers without another bound: more than torch's indices hold


@dataclass(frozen=True)
class Command:
    """A command and what it takes.

    Args:
        program: its file.
        usage: what follows `python <program>`.
        options: the dataclass that declares its options.
        known_by_place: options that follow from where the --config file lies, {name: value}, whatever the
        file says.
    """

    program: str
    usage: str
    description: str
    options: type
    epilog: str = ""
    known_by_place: Callable[[str], dict[str, str]] = lambda path: {}

    @cached_property
    def fields(self) -> dict[str, Field]:
        return options_of(self.options)

    @cached_property
    def hints(self) -> dict[str, Any]:
        return typing.get_type_hints(self.options)

    def kind(self, name: str) -> tuple[type, bool]:
        """(int, float, bool, str or Path; whether None is allowed) of an option; of a list, that of its
        items."""
        hint, optional = self.hints[name], False
        if isinstance(hint, types.UnionType):
            hint, optional = next(t for t in typing.get_args(hint) if t is not types.NoneType), True
        return typing.get_args(hint)[0] if typing.get_origin(hint) in (list, tuple) else hint, optional

    def read(self, argv: list[str]) -> dict[str, Any]:
        """The options that are given, by name, in their types and ranges; those of --config where the command
        line does not have them. Raises UserError; exits 0 on --help."""
        arguments = self._separated(self._underscored(argv))
        found, rest = _parser(self).parse_known_args(arguments)
        if rest:
            known = suggest(rest[0].split("=")[0], self.fields)
            one = next(
                (f.metadata["positional"] for f in self.fields.values() if f.metadata["positional"]), ""
            )
            known = f"; give one {one}" if one and not rest[0].startswith("-") else known
            raise UserError(f"unknown option {rest[0]}{known}")
        raw = {name: value for name, value in vars(found).items() if value not in (None, [])}
        written = self._read_yaml(raw.pop("config")) if "config" in raw else {}
        given = {name: self._convert(name, value, where) for name, (value, where) in written.items()}
        for name, value in raw.items():
            positional = self.fields[name].metadata["positional"]
            given[name] = self._convert(name, value, positional or f"--{name}")
        texts = {name: str(value) for name, (value, _) in written.items()}
        self._check(given, texts | {name: str(value) for name, value in raw.items()})
        return given

    def _check(self, given: dict[str, Any], texts: dict[str, str]) -> None:
        """Raises UserError for a number out of range, and for what is required and missing. texts: what is
        given, as it was written."""
        for name, field in self.fields.items():
            if field.default is REQUIRED and not (given.get(name) and texts[name]):
                what = field.metadata["positional"]
                missing = f"give a {what}, {field.metadata['help']}" if what else f"--{name} is missing"
                raise UserError(f"{missing}; see --help")
            if name not in given:
                continue
            value, within = given[name], field.metadata["within"]
            if type(value) not in (int, float):
                continue
            if within and not within.holds(value):
                finite = ", and finite" if type(value) is float and within.is_obvious else ""
                raise UserError(f"--{name} {texts[name]}: must be {within}{finite}")
            bounded = within and (within.most is not None or within.below is not None)
            if type(value) is int and not bounded and abs(value) >= LARGEST:
                raise UserError(f"--{name} {value}: must be below 2**31")

    def _convert(self, name: str, value: Value, where: str):
        """value, a text or list of texts or what else a file gives, as the option's type. Raises UserError
        that names `where`."""
        meta, (kind, _) = self.fields[name].metadata, self.kind(name)
        noun = meta["noun"]
        if meta["repeat"]:
            values = value if isinstance(value, list) else [value]
            return [_converted(kind, each, where, noun) for each in values]
        if meta["commas"] and isinstance(value, list):
            value = ",".join(_item(each, where) for each in value)
        if meta["convert"] and isinstance(value, str):
            try:
                result = meta["convert"](value)
            except ValueError:
                raise UserError(f"{where}: {value!r} is not {noun}") from None
        else:
            result = _converted(kind, value, where, noun)
        if meta["choices"] and result not in meta["choices"]:
            raise UserError(f"{where}: {result!r} is none of {', '.join(map(str, meta['choices']))}")
        return result

    def _underscored(self, argv: list[str]) -> list[str]:
        """--train-type=x -> --train_type=x. Values stay as they are, also one that looks like an option,
        behind an option that takes a text."""
        texts = {
            f"--{n}"
            for n, f in self.fields.items()
            if not f.metadata["positional"] and self.kind(n)[0] is str
        }
        spelled: list[str] = []
        for each in argv:
            is_value = bool(spelled) and spelled[-1] in texts and " " in each
            match = None if is_value else re.match(r"--[a-z][a-z0-9-]*", each)
            spelled.append("--" + match[0][2:].replace("-", "_") + each[match.end() :] if match else each)
        return spelled

    def _separated(self, argv: list[str]) -> list[str]:
        """--verbose RUN -> --verbose=true RUN: where a folder may stand without a name, a switch does not
        take it as its value."""
        if not any(field.metadata["positional"] for field in self.fields.values()):
            return argv
        switches = {f"--{name}" for name in self.fields if self.kind(name)[0] is bool}
        return [
            f"{each}=true"
            if each in switches and after.lower() not in TRUTHS and os.path.exists(after)
            else each
            for each, after in itertools.zip_longest(argv, argv[1:], fillvalue="")
        ]

    def _read_yaml(self, path: str) -> dict[str, tuple[Value, str]]:
        """{option: (its value in the file, where it stands)}."""
        values: dict[str, tuple[Value, str]] = {}
        for key, value in read_options_file(path).items():
            name = key.replace("-", "_")
            if name not in self.fields:
                raise UserError(f"--config {path}: unknown option {key}{suggest(key, self.fields)}")
            if value is not None:  # a null line is an option that was not given
                values[name] = value, f"{path}: {name}"
        return values | {name: (value, path) for name, value in self.known_by_place(path).items()}


def _item(value: str | None, where: str) -> str:
    """One of the values that an option has comma-separated. Raises UserError for one that would be none or
    several."""
    if value is None or "," in value:
        raise UserError(f"{where}: {value!r} is not one value of the list")
    return value


def _converted(kind: type, value: Value, where: str, noun: str):
    text = value.strip() if isinstance(value, str) else str(value)
    try:
        if not isinstance(value, str):
            raise ValueError
        if kind is bool:
            return TRUTHS[text.lower()]
        if kind is float:
            text = re.sub(r"^([-+]?)\.(?=inf$|nan$)", r"\1", text, flags=re.IGNORECASE)  # YAML's spelling
        result = Path(value).expanduser() if kind is Path else value if kind is str else kind(text)
    except (ValueError, KeyError, RuntimeError):  # RuntimeError: a home that nobody has
        raise UserError(f"{where}: {text!r} is not {noun or NOUNS.get(kind, 'a text')}") from None
    if kind is Path and not text:
        raise UserError(f"{where}: needs a path")
    if kind is float and result != result:
        raise UserError(f"{where}: {text!r} is not {NOUNS[float]}")
    return result


class Parser(argparse.ArgumentParser):
    """argparse with errors as UserErrors."""

    def error(self, message):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        several = {action.dest for action in self._actions if action.nargs == "*"}
        for name, value in vars(found).items():
            if value == [] and name not in several:  # what argparse makes of `--name=--`
                raise UserError(f"--{name}: expected a value")
        return found, rest


def _parser(command: Command) -> Parser:
    parser = Parser(
        prog=command.program,
        usage=f"python {command.program} {command.usage}",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description=command.description,
        epilog=command.epilog,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=110),
    )
    parser.add_argument("--config", metavar="YAML", help="read options from this file; the command line wins")
    groups: dict[str, Any] = {}
    for name, field in command.fields.items():
        meta, (kind, _) = field.metadata, command.kind(name)
        if meta["positional"]:
            nargs = "*" if meta["repeat"] else "?"
            parser.add_argument(name, metavar=meta["positional"], nargs=nargs, help=meta["help"])
            continue
        group = groups.get(meta["group"]) or parser.add_argument_group(meta["group"])
        groups[meta["group"]] = group
        more: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
        more |= {"action": "append"} if meta["repeat"] else {}
        metavar = "NAME" if meta["choices"] else "TEXT" if meta["convert"] else METAVARS.get(kind, "TEXT")
        group.add_argument(f"--{name}", metavar=metavar, help=help_line(field).replace("%", "%%"), **more)
    return parser


def help_line(field: Field) -> str:
    """What --help says of an option: its meaning, choices, default, range, and the train types that it is
    for."""
    meta = field.metadata
    text = meta["help"]
    if meta["choices"]:
        text += f": {', '.join(map(str, meta['choices']))}"
    default = "required" if field.default is REQUIRED else shown(field.default)
    within = meta["within"]
    text += f" [{default}{'' if within is None or within.is_obvious else f'; {within}'}]"
    return f"{text} (only for {NEEDS[meta['needs']]})" if meta["needs"] else text


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error line about an unknown option."""
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    return f"; did you mean --{near[0]}?" if near else "; see --help"
