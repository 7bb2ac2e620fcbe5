"""Shared code of tests is in tests/helpers: no test file is imported, so each can be changed alone."""

from __future__ import annotations

import ast
from importlib.util import resolve_name

import pytest

from tests.helpers.programs import ROOT


def imported_tests(source: str, package: str) -> list[str]:
    """Return the full names of test files, and of names in them, that a file of the package imports."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names += [f"{module}.{a.name}" for a in node.names]
    return [name for name in names if name.startswith("tests.") and ".test_" in name]


def test_no_test_file_is_imported():
    files = sorted((ROOT / "tests").rglob("*.py"))
    found = []
    for path in files:
        name = path.relative_to(ROOT)
        found += [
            f"{name}: {test}" for test in imported_tests(path.read_text("utf-8"), ".".join(name.parts[:-1]))
        ]
    assert len(files) > 100 and found == []


@pytest.mark.parametrize(
    "source",
    [
        "from tests.data.test_packing import learn",
        "from tests.data import test_packing as packing",
        "from tests import test_parity",
        "import tests.data.test_packing",
        "from .test_packing import learn",
        "from . import helpers, test_packing",
        "from ..test_parity import learn",
        "from .. import test_parity",
        "def learn():\n    import tests.test_parity",
    ],
)
def test_each_of_these_would_be_found(source):
    assert len(imported_tests(source, "tests.data")) == 1
