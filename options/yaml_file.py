"""Reads a YAML file of options as texts. The option, not YAML, determines the type of a value.

YAML 1.1 turns plain texts into numbers, dates and booleans: `1.10` becomes 1.1, `on` true, `010` 8, `1:30`
90. An option that takes a text would lose how it was written. So scalars are read as texts, and converted
like those of a command line.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from options.errors import UserError
from options.limits import MAX_OPTIONS_BYTES, read_text

STANDARD = "tag:yaml.org,2002:"
NULL = f"{STANDARD}null"
# Tags that YAML itself gives to plain scalars. Any other tag is written in the file and asks for another kind
# of object.
PLAIN = {
    f"{STANDARD}{kind}" for kind in ("null", "bool", "int", "float", "timestamp", "str", "merge", "value")
}
Value = str | None | list[str | None] | dict


def read_options_file(path: str) -> dict[str, Value]:
    """Return {option: value} of a file of `option: value` lines.

    A value is a text as written, without quotes; None for a plain `null`, `~` or nothing; a list of these; or
    {} for any mapping, since no option takes one. Raises UserError if the file has other lines, or a key
    twice.
    """
    try:
        text = read_text(Path(path), MAX_OPTIONS_BYTES)
        _check_flat(text, path)
        root = yaml.compose(text, yaml.SafeLoader)
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a UTF-8 text") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL or half a character in the name
        reason = getattr(e, "strerror", None) or f"not YAML ({e})"
        raise UserError(f"--config {path}: {reason}") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"--config {path}:{line} is not YAML ({getattr(e, 'problem', e)})") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path}: expected lines of `option: value`")
    given: dict[str, Value] = {}
    seen: set[str] = set()  # keys with _ for -
    for key_node, value_node in root.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"--config {path}: {_line(key_node)}: expected lines of `option: value`")
        key = key_node.value
        if key.replace("-", "_") in seen:
            raise UserError(f"--config {path}: {_line(key_node)}: {key} is given a second time")
        seen.add(key.replace("-", "_"))
        given[key] = _read_value(value_node, path)
    return given


def _read_value(node: yaml.Node, path: str) -> Value:
    """Return a text, None for null, a list of these, or {} for any mapping. Raises UserError for others."""
    if isinstance(node, yaml.SequenceNode):
        return [_read_scalar(each, path) for each in node.value]
    return {} if isinstance(node, yaml.MappingNode) else _read_scalar(node, path)


def _read_scalar(node: yaml.Node, path: str) -> str | None:
    """Return a scalar as a text, or None for null. Raises UserError for any other kind of object."""
    if node.tag not in PLAIN:  # lists and mappings within a list have another tag as well
        raise UserError(f"--config {path}: {_line(node)} is not YAML that is read here (the tag {node.tag})")
    return None if node.tag == NULL else node.value


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _check_flat(text: str, path: str) -> None:
    """Raise UserError for aliases and for nesting deeper than lists of values; YAMLError if it is not YAML.

    An alias can expand to any size, and deep nesting overflows the stack.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = f"line {event.start_mark.line + 1}" if event.start_mark else "a line"
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"--config {path}: {line}: aliases (*) are not read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 2:
            advice = "`python -m tools.migrate` reads other programs' files"
            raise UserError(f"--config {path}: {line}: nested; expected lines of `option: value`; {advice}")
