"""Errors about options that a command does not have: what another program's are here, or the nearest name."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import Field
from functools import partial
from itertools import takewhile

from options.foreign import ForeignOptions
from options.yaml_file import Value

PATTERN_OPTIONS = ("dataset", "eval_dataset", "sample_prompts")  # each takes a pattern of files


def describe_arguments(
    rest: Sequence[str],
    arguments: Sequence[str],
    known: Mapping[str, str],
    fields: Mapping[str, Field],
    foreign: ForeignOptions | None,
) -> str:
    """Return the error line for arguments that are no options and values of a command.

    Args:
        rest: these arguments; not empty.
        arguments: the whole command line.
        known: the options of the command that are given, with their values.
        fields: the command's options, by name.
        foreign: what it knows of other programs' options.
    """
    unknown = _unknown_options(rest, arguments)
    if foreign and (line := foreign.explain(unknown, known, partial(_write_option, fields), "--")):
        return line
    first, hint = rest[0], _suggest(rest[0].split("=")[0], fields)
    if not first.startswith("-"):
        positional = next(filter(None, (field.metadata["positional"] for field in fields.values())), "")
        hint = f"; give one {positional}" if positional else hint
        before = list(arguments[: arguments.index(first)])
        at = next((i for i in reversed(range(len(before))) if before[i].startswith("--")), 0)
        name = before[at][2:] if before else ""
        if name in fields and name in PATTERN_OPTIONS and os.path.exists(first):
            pattern = _find_pattern([*before[at + 1 :], *takewhile(lambda each: each[:2] != "--", rest)])
            return (
                f"--{name}: {first} is a second value; the shell expands a pattern without quotes:"
                f" --{name} '{pattern}'"
            )
        if name in fields and fields[name].metadata["commas"]:
            return (
                f"--{name}: values are separated by commas: --{name} {','.join([*before[at + 1 :], first])}"
            )
    return f"unknown option {first}{hint}"


def describe_keys(
    given: Mapping[str, Value], fields: Mapping[str, Field], foreign: ForeignOptions | None, path: str
) -> str:
    """Return the error line for a --config file whose keys are not all options; "" if they are.

    Args:
        given: what the file holds.
        fields: the command's options, by name.
        foreign: what it knows of other programs' options.
        path: the file.
    """
    unknown = {key: value for key, value in given.items() if key.replace("-", "_") not in fields}
    if not unknown:
        return ""
    texts = {key.replace("-", "_"): _as_text(value) for key, value in unknown.items()}
    known = {key.replace("-", "_"): _as_text(value) for key, value in given.items() if key not in unknown}
    if foreign and (line := foreign.explain(texts, known, _write_line, file=path)):
        return f"--config {path}: {line}"
    first = next(iter(unknown))
    return f"--config {path}: unknown option {first}{_suggest(first, fields)}"


def _suggest(name: str, fields: Mapping[str, Field]) -> str:
    """Return the end of an error line about an unknown option: "; did you mean --lr?" or "; see --help"."""
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), fields, n=1)
    return f"; did you mean --{near[0]}?" if near else "; see --help"


def _find_pattern(paths: Sequence[str]) -> str:
    """Return the pattern that a shell may have expanded to the paths."""
    start = _find_common_start(paths)
    ends = [path[len(start) :][::-1] for path in paths]
    return f"{start}*{_find_common_start(ends)[::-1]}"


def _find_common_start(texts: Sequence[str]) -> str:
    """Return the characters with which all texts begin."""
    columns = takewhile(lambda column: len({*column}) == 1, zip(*texts, strict=False))
    return "".join(column[0] for column in columns)


def _unknown_options(rest: Sequence[str], arguments: Sequence[str]) -> dict[str, str]:
    """Return {name: value} of what argparse did not know; a list's values are joined by commas.

    Values are those that follow an option on the whole command line: `rest` also has values of known options,
    which then seem to follow an unknown one.
    """
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for each in arguments:
        if not re.match(r"--\w", each):
            values.append(each)
        elif each in rest:
            name, is_assignment, value = each[2:].partition("=")
            values = found.setdefault(name, [])
            values += [value] if is_assignment else []
        else:
            values = []  # of a known option
    return {name: ",".join(values) if values else "true" for name, values in found.items()}


def _write_option(fields: Mapping[str, Field], name: str, value: str) -> str:
    """Return an option as on a command line.

    A foreign option without a value has the value `true`. If the option here is no switch, ... stands for it.
    """
    is_switch = fields[name].type == "bool" or "true" in (fields[name].metadata["choices"] or ())
    return f"--{name} {'...' if value == 'true' and not is_switch else shlex.quote(value)}"


def _write_line(name: str, value: str) -> str:
    """Return an option as in a --config file."""
    return f"`{name}: {value}`"


def _as_text(value: Value) -> str:
    """Return a value of a --config file as one text: a list with commas, "" for null and mappings."""
    if isinstance(value, list):
        return ",".join(filter(None, value))
    return value if isinstance(value, str) else ""
