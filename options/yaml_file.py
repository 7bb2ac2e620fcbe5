"""A YAML file of options as texts: what a value means is for the option to say, not for YAML.

YAML 1.1 makes numbers, dates and booleans of plain texts: `1.10` becomes 1.1, `on` true, `010` 8, `1:30` 90.
An option of texts would lose what was written. So scalars are read as they stand, and converted like those of
a command line.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from options.errors import UserError
from options.limits import OPTIONS_FILE, read_text

STANDARD = "tag:yaml.org,2002:"
NULL = f"{STANDARD}null"
# Tags that YAML gives to plain scalars by itself. Any other tag was written, and asks for another kind of
# object.
PLAIN = {
    f"{STANDARD}{kind}" for kind in ("null", "bool", "int", "float", "timestamp", "str", "merge", "value")
}
Value = str | None | list[str | None] | dict


def read_options_file(path: str) -> dict[str, Value]:
    """Read a file of `option: value` lines. Return {option: its value}.

    A value is a text as it is written there, quotes left out; None for a plain `null`, `~` or nothing; a list
    of these; or {}, which stands for any mapping, as no option takes one. Raises UserError for a file that is
    not such lines, or has a key twice.
    """
    try:
        text = read_text(Path(path), OPTIONS_FILE)
        _check_flat(text, path)
        root = yaml.compose(text, yaml.SafeLoader)
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a UTF-8 text") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name, or half a character
        reason = getattr(e, "strerror", None) or f"not YAML ({e})"
        raise UserError(f"--config {path}: {reason}") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"--config {path}:{line} is not YAML ({getattr(e, 'problem', e)})") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path}: expected lines of `option: value`")
    given: dict[str, Value] = {}
    seen: set[str] = set()  # keys as an option spells them
    for key_node, value_node in root.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"--config {path}: {_line(key_node)}: expected lines of `option: value`")
        key = key_node.value
        if key.replace("-", "_") in seen:
            raise UserError(f"--config {path}: {_line(key_node)}: {key} is given a second time")
        seen.add(key.replace("-", "_"))
        given[key] = _value(value_node, path)
    return given


def _value(node: yaml.Node, path: str) -> Value:
    if isinstance(node, yaml.SequenceNode):
        return [_scalar(each, path) for each in node.value]
    return {} if isinstance(node, yaml.MappingNode) else _scalar(node, path)


def _scalar(node: yaml.Node, path: str) -> str | None:
    if node.tag not in PLAIN:  # a list or a mapping within a list has one of its own, too
        raise UserError(f"--config {path}: {_line(node)} is not YAML that is read here (the tag {node.tag})")
    return None if node.tag == NULL else node.value


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _check_flat(text: str, path: str) -> None:
    """Raise UserError for more than lines of `option: value` or lists of values: an alias or a merge stands
    for as much as its writer likes, and depth costs the stack."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = f"line {event.start_mark.line + 1}" if event.start_mark else "a line"
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"--config {path}: {line}: aliases (*) are not read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 2:
            raise UserError(f"--config {path}: {line}: nested; expected lines of `option: value`")
