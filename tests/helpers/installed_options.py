"""Options that installed training programs declare, read from their files. Importing them takes seconds."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NOT_LITERAL = object()  # the default of an option that is computed


def declared_options(module: str, *classes: str) -> dict[str, Any]:
    """Return {option: default} of an installed module's dataclasses, without importing it.

    A default is None where there is none, and NOT_LITERAL where it is computed.
    """
    package, *rest = module.split(".")
    path = Path(find_spec(package).submodule_search_locations[0], *rest).with_suffix(".py")
    found = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name in classes
    ]
    assert {node.name for node in found} == set(classes)
    return {
        each.target.id: _default(each.value)
        for node in found
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }


def _default(value: ast.expr | None) -> Any:
    """Return the literal default of a field, written as `= value` or `= field(default=value)`."""
    if isinstance(value, ast.Call):
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return NOT_LITERAL
