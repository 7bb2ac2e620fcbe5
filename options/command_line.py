"""Reads options from command lines and YAML files, with the same checks and errors in every command.

Nothing here imports torch or transformers, which takes seconds: wrong options and --help are answered at
once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import types
import typing
from collections.abc import Callable, Set
from dataclasses import Field, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from options.declaration import AUTO, REQUIRED, format_value, option_fields
from options.errors import UserError
from options.foreign import ForeignOptions
from options.methods import NEEDS
from options.unknown_options import describe_arguments, describe_keys
from options.yaml_file import Value, read_options_file

BOOLEANS = {
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
LARGEST_INT = 2**31  # exclusive bound of whole numbers without an upper bound: torch's indices hold no more


@dataclass(frozen=True)
class Command:
    """A command and the options that it takes.

    Attributes:
        program: its file.
        usage: the rest of the usage line, after `python <program>`.
        description, epilog: texts of --help, before and after the options.
        options: the dataclass that declares its options.
        implied_by_path: implied_by_path(path of the --config file) returns {option: value}. These options
            follow from the file's folder and override what the file says.
        displaced: displaced(names in the --config file, names on the command line, whether `implied_by_path`
            knows the file's folder) returns the names in the file that are not read.
        foreign: options of other programs, for errors that say what they are here; None = it knows none.
        pages: options that print a text and end, as --help does; of each (name, line in --help, function
            that makes the text).
    """

    program: str
    usage: str
    description: str
    options: type
    epilog: str = ""
    implied_by_path: Callable[[str], dict[str, str]] = lambda path: {}
    displaced: Callable[[Set[str], Set[str], bool], Set[str]] = lambda in_file, typed, is_known: set()
    foreign: ForeignOptions | None = None
    pages: tuple[tuple[str, str, Callable[[], str]], ...] = ()

    @cached_property
    def fields(self) -> dict[str, Field]:
        """The declarations of its options, by name."""
        return option_fields(self.options)

    @cached_property
    def hints(self) -> dict[str, Any]:
        """The type hints of its options, by name."""
        return typing.get_type_hints(self.options)

    def value_type(self, name: str) -> tuple[type, bool]:
        """Return (the type of an option's value or list items, whether it may be None).

        The type is int, float, bool, str or Path.
        """
        hint, optional = self.hints[name], False
        if isinstance(hint, types.UnionType):
            hint, optional = next(t for t in typing.get_args(hint) if t is not types.NoneType), True
        return typing.get_args(hint)[0] if typing.get_origin(hint) in (list, tuple) else hint, optional

    def read(self, argv: list[str]) -> dict[str, Any]:
        """Return the options given in `argv` or its --config file, {name: converted value}; `argv` wins.

        Raises UserError for an unknown, wrong or missing option; exits 0 on --help.
        """
        arguments = self._complete_switches(self._normalize_dashes(argv))
        found, rest = _make_parser(self).parse_known_args(arguments)
        if rest:
            known = {name: value for name, value in vars(found).items() if isinstance(value, str)}
            raise UserError(describe_arguments(rest, arguments, known, self.fields, self.foreign))
        raw = {name: value for name, value in vars(found).items() if value not in (None, [])}
        path = raw.pop("config", None)
        in_file = {} if path is None else self._read_yaml(path, raw.keys())
        given = {name: self._convert(name, value, origin) for name, (value, origin) in in_file.items()}
        for name, value in raw.items():
            positional = self.fields[name].metadata["positional"]
            given[name] = self._convert(name, value, positional or f"--{name}")
        texts = {name: str(value) for name, (value, _) in in_file.items()}
        self._check_ranges_and_required(given, texts | {name: str(value) for name, value in raw.items()})
        return given

    def _check_ranges_and_required(self, given: dict[str, Any], texts: dict[str, str]) -> None:
        """Raise UserError for a number out of range, or a required option that is missing.

        given: {name: converted value}; texts: {name: the value as it was written}.
        """
        for name, field in self.fields.items():
            if field.default is REQUIRED and not (given.get(name) and texts[name]):
                positional = field.metadata["positional"]
                missing = (
                    f"give a {positional}, {field.metadata['help']}" if positional else f"--{name} is missing"
                )
                raise UserError(f"{missing}; see --help")
            if name not in given:
                continue
            value, within = given[name], field.metadata["within"]
            if field.metadata["auto"] and _is_auto(texts[name]):
                continue
            if type(value) not in (int, float):
                continue
            has_upper_bound = within and within.has_upper_bound
            if within and not within.contains(value):
                finite = ", and finite" if type(value) is float and not has_upper_bound else ""
                text = within.describe(is_whole=type(value) is int)
                raise UserError(f"--{name} {texts[name]}: must be {text}{finite}")
            if type(value) is int and not has_upper_bound and abs(value) >= LARGEST_INT:
                raise UserError(f"--{name} {value}: must be below 2**31")

    def _convert(self, name: str, value: Value, origin: str):
        """Return a value in the option's type, or a list of such values if the option may be repeated.

        Raises UserError if the value does not fit the type or is not one of the choices.

        Args:
            name: the option.
            value: a text, a list of texts, or whatever else the --config file holds.
            origin: where the value was given, for the error.
        """
        meta, (kind, _) = self.fields[name].metadata, self.value_type(name)
        noun, here = meta["noun"], self._value_here(name, value)
        if meta["repeat"]:
            values = value if isinstance(value, list) else [value]
            return [_parse_value(kind, each, origin, noun) for each in values]
        if meta["commas"] and isinstance(value, list):
            value = ",".join(_check_item(each, origin) for each in value)
        if meta["auto"] and _is_auto(value):
            return AUTO
        if meta["convert"] and isinstance(value, str):
            try:
                result = meta["convert"](value)
            except ValueError:
                raise UserError(f"{origin}: {value!r} is not {noun}") from None
        else:
            try:
                result = _parse_value(kind, value, origin, noun)
            except UserError as e:
                raise UserError(f"{e}{here if kind in (int, float) else ''}") from None
        if meta["choices"] and result not in meta["choices"]:
            choices = ", ".join(map(str, meta["choices"]))
            raise UserError(f"{origin}: {result!r}: must be one of {choices}{here}")
        if here and kind is str and not meta["choices"] and not os.path.exists(str(value)):
            raise UserError(f"{origin} {value}{here}")
        return result

    def _value_here(self, name: str, value: Value) -> str:
        """Return the end of an error about a value that another program gives to an option, or ""."""
        here = self.foreign.value_here(name, value) if self.foreign and isinstance(value, str) else ""
        return f"; here it is {here}" if here else ""

    def _normalize_dashes(self, argv: list[str]) -> list[str]:
        """Replace - by _ in option names: --train-type=x -> --train_type=x. Values are not changed.

        A text that looks like an option and holds a space is a value if it follows an option that takes a
        text.
        """
        named = (name for name, field in self.fields.items() if not field.metadata["positional"])
        takes_text = {f"--{name}" for name in named if self.value_type(name)[0] is str}
        normalized: list[str] = []
        for each in argv:
            is_value = bool(normalized) and normalized[-1] in takes_text and " " in each
            match = None if is_value else re.match(r"--[a-z][a-z0-9-]*", each)
            normalized.append("--" + match[0][2:].replace("-", "_") + each[match.end() :] if match else each)
        return normalized

    def _complete_switches(self, argv: list[str]) -> list[str]:
        """Return `argv` with --verbose RUN as --verbose=true RUN, in commands with positional arguments.

        Otherwise a switch would take an existing file or folder after it as its value.
        """
        if not any(field.metadata["positional"] for field in self.fields.values()):
            return argv
        switches = {f"--{name}" for name in self.fields if self.value_type(name)[0] is bool}
        return [
            f"{each}=true"
            if each in switches and after.lower() not in BOOLEANS and os.path.exists(after)
            else each
            for each, after in itertools.zip_longest(argv, argv[1:], fillvalue="")
        ]

    def split(self, argv: list[str]) -> list[tuple[str, list[str]]]:
        """Return the command line as [(option, its words with those of its value)], in order.

        argv: one that `read` accepts, of a command without positional arguments.
        """
        found: list[tuple[str, list[str]]] = []
        for each in self._normalize_dashes(argv):
            name = each[2:].partition("=")[0] if each.startswith("--") else ""
            if name in self.fields or name == "config":
                found.append((name, [each]))
            else:
                found[-1][1].append(each)
        return found

    def config_file(self, argv: list[str]) -> str | None:
        """Return the path after --config, the last one; None without. argv: as for `split`."""
        words = dict(self.split(argv)).get("config")
        if words is None:
            return None
        return words[1] if len(words) > 1 else words[0].partition("=")[2]

    def _read_yaml(self, path: str, typed: Set[str]) -> dict[str, tuple[Value, str]]:
        """Return {option: (value, its origin for errors)} of the --config file, but nulls and `displaced`.

        `implied_by_path` overrides it. Raises UserError for an unknown option.

        typed: names of the options on the command line.
        """
        values: dict[str, tuple[Value, str]] = {}
        given = read_options_file(path)
        if line := describe_keys(given, self.fields, self.foreign, path):
            raise UserError(line)
        for key, value in given.items():
            name = key.replace("-", "_")
            if value is not None:  # null means that the option is not given
                values[name] = value, f"{path}: {name}"
        implied = self.implied_by_path(path)
        displaced = self.displaced(values.keys(), typed, bool(implied))
        values = {name: value for name, value in values.items() if name not in displaced}
        return values | {name: (value, path) for name, value in implied.items()}


def _is_auto(value: Value) -> bool:
    """Return whether a number is given as `auto`."""
    return isinstance(value, str) and value.strip().lower() == "auto"


def _check_item(value: str | None, origin: str) -> str:
    """Return an item of a list in a --config file as it is. Raises UserError if it is null or has a comma."""
    if value is None or "," in value:
        raise UserError(f"{origin}: {value!r} is not one value of the list")
    return value


def _parse_value(kind: type, value: Value, origin: str, noun: str):
    """Return a text as a value of type `kind`. Raises UserError if it does not fit.

    Args:
        kind: int, float, bool, str or Path.
        value: the text, or whatever else the --config file holds.
        origin: where it was given, for the error.
        noun: what it must be, for the error; "" = as the type says.
    """
    text = value.strip() if isinstance(value, str) else str(value)
    try:
        if not isinstance(value, str):
            raise ValueError
        if kind is bool:
            return BOOLEANS[text.lower()]
        if kind is float:
            text = re.sub(r"^([-+]?)\.(?=inf$|nan$)", r"\1", text, flags=re.IGNORECASE)  # YAML's spelling
        result = Path(value).expanduser() if kind is Path else value if kind is str else kind(text)
    except (ValueError, KeyError, RuntimeError):  # RuntimeError: ~ of an unknown user
        raise UserError(f"{origin}: {text!r} is not {noun or NOUNS.get(kind, 'a text')}") from None
    if kind is Path and not text:
        raise UserError(f"{origin}: needs a path")
    if kind is float and result != result:
        raise UserError(f"{origin}: {text!r} is not {NOUNS[float]}")
    return result


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors as UserErrors."""

    def error(self, message):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, but raise UserError for an empty value that argparse accepts."""
        found, rest = super().parse_known_args(args, namespace)
        may_be_empty = {action.dest for action in self._actions if action.nargs == "*"}
        for name, value in vars(found).items():
            if value == [] and name not in may_be_empty:  # argparse returns [] for `--name=--`
                raise UserError(f"--{name}: expected a value")
        return found, rest


class _PrintPage(argparse.Action):
    """An option that prints a text and exits with status 0."""

    def __init__(self, option_strings, dest: str, page: Callable[[], str], **options):
        super().__init__(option_strings, dest, nargs=0, **options)
        self.page = page

    def __call__(self, parser, *_):
        """Print the text and exit."""
        with contextlib.suppress(OSError):  # as argparse does for --help: of a closed pipe, for instance
            print(self.page(), flush=True)
        parser.exit()


def _make_parser(command: Command) -> Parser:
    """Return the parser of a command's options. It leaves all values as texts."""
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
    for name, line, page in command.pages:
        parser.add_argument(f"--{name}", action=_PrintPage, page=page, help=line)
    groups: dict[str, Any] = {}
    for name, field in command.fields.items():
        meta, (kind, _) = field.metadata, command.value_type(name)
        if meta["positional"]:
            nargs = "*" if meta["repeat"] else "?"
            parser.add_argument(name, metavar=meta["positional"], nargs=nargs, help=meta["help"])
            continue
        group = groups.get(meta["group"]) or parser.add_argument_group(meta["group"])
        groups[meta["group"]] = group
        kwargs: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
        kwargs |= {"action": "append"} if meta["repeat"] else {}
        metavar = "NAME" if meta["choices"] else "TEXT" if meta["convert"] else METAVARS.get(kind, "TEXT")
        metavar += "|auto" * meta["auto"]
        group.add_argument(f"--{name}", metavar=metavar, help=help_line(field).replace("%", "%%"), **kwargs)
    return parser


def help_line(field: Field) -> str:
    """Return an option's text in --help: its meaning, choices, default, range, and train types."""
    meta = field.metadata
    text = meta["help"]
    if meta["choices"]:
        text += f": {', '.join(map(str, meta['choices']))}"
    default = "required" if field.default is REQUIRED else format_value(field.default)
    within = meta["within"]
    text += f" [{default}{f'; {within}' if within and within.has_upper_bound else ''}]"
    return f"{text} (only for {NEEDS[meta['needs']]})" if meta["needs"] else text
