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
NESTED = {f"{STANDARD}seq", f"{STANDARD}map"}  # the same of lists and mappings
Value = str | None | list[str | None] | dict
Tree = str | None | list["Tree"] | dict[str, "Tree"]
MAX_DEPTH = 12  # of other programs' files


def read_options_file(path: str) -> dict[str, Value]:
    """Return {option: value} of a file of `option: value` lines.

    A value is a text as written, without quotes; None for a plain `null`, `~` or nothing; a list of these; or
    {} for any mapping, since no option takes one. Raises UserError if the file has other lines, or a key
    twice.
    """
    name, expected = f"--config {path}", "expected lines of `option: value`"
    advice = f"nested; {expected}; `python -m tools.migrate {path}` translates another program's file"
    root = _compose(path, name, 2, advice)
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{name}: {expected}")
    given: dict[str, Value] = {}
    seen: set[str] = set()  # keys with _ for -
    for key_node, value_node in root.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{name}: {_line(key_node)}: {expected}")
        key = key_node.value
        if key.replace("-", "_") in seen:
            raise UserError(f"{name}: {_line(key_node)}: {key} is given a second time")
        seen.add(key.replace("-", "_"))
        given[key] = _read_value(value_node, name)
    return given


def read_tree(path: str) -> Tree:
    """Return a YAML file of another program: nested mappings and lists, with scalars as texts or None.

    Raises UserError if it is not YAML, nested deeper than MAX_DEPTH, or has a key twice, an alias or a tag.
    """
    return _read_tree(_compose(path, path, MAX_DEPTH, f"nested deeper than {MAX_DEPTH} levels"), path)


def _compose(path: str, name: str, max_depth: int, too_deep: str) -> yaml.Node | None:
    """Return the root of a YAML file, None if it is empty. Raises UserError if it cannot be read.

    Args:
        path: the file.
        name: what errors call it.
        max_depth: mappings and lists within one another.
        too_deep: the error for more of them.
    """
    try:
        text = read_text(Path(path), MAX_OPTIONS_BYTES)
        _check_structure(text, name, max_depth, too_deep)
        return yaml.compose(text, yaml.SafeLoader)
    except UnicodeDecodeError:
        raise UserError(f"{name}: not a UTF-8 text") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL or half a character in the name
        reason = getattr(e, "strerror", None) or f"not YAML ({e})"
        raise UserError(f"{name}: {reason}") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{name}:{line} is not YAML ({getattr(e, 'problem', e)})") from None


def _read_tree(node: yaml.Node | None, name: str) -> Tree:
    """Return a node and what it holds. Raises UserError for a key twice, or a key that is not a text."""
    if node is None:
        return None
    if not isinstance(node, yaml.ScalarNode) and node.tag not in NESTED:
        raise UserError(f"{name}: {_line(node)} is not YAML that is read here (the tag {node.tag})")
    if isinstance(node, yaml.SequenceNode):
        return [_read_tree(each, name) for each in node.value]
    if not isinstance(node, yaml.MappingNode):
        return _read_scalar(node, name)
    found: dict[str, Tree] = {}
    for key_node, value_node in node.value:
        key = _read_scalar(key_node, name) if isinstance(key_node, yaml.ScalarNode) else None
        if key is None or key in found:
            reason = "a key that is not a text" if key is None else f"{key} is given a second time"
            raise UserError(f"{name}: {_line(key_node)}: {reason}")
        found[key] = _read_tree(value_node, name)
    return found


def _read_value(node: yaml.Node, name: str) -> Value:
    """Return a text, None for null, a list of these, or {} for any mapping. Raises UserError for others."""
    if isinstance(node, yaml.SequenceNode):
        return [_read_scalar(each, name) for each in node.value]
    return {} if isinstance(node, yaml.MappingNode) else _read_scalar(node, name)


def _read_scalar(node: yaml.Node, name: str) -> str | None:
    """Return a scalar as a text, or None for null. Raises UserError for any other kind of object."""
    if node.tag not in PLAIN:  # lists and mappings within a list have another tag as well
        raise UserError(f"{name}: {_line(node)} is not YAML that is read here (the tag {node.tag})")
    return None if node.tag == NULL else node.value


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _check_structure(text: str, name: str, max_depth: int, too_deep: str) -> None:
    """Raise UserError for aliases and for nesting deeper than `max_depth`; YAMLError if it is not YAML.

    An alias can expand to any size, and deep nesting overflows the stack.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = f"line {event.start_mark.line + 1}" if event.start_mark else "a line"
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{name}: {line}: aliases (*) are not read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > max_depth:
            raise UserError(f"{name}: {line}: {too_deep}")
