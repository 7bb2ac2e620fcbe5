"""Which package may import which, and no cycles of imports."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.programs import ROOT

# Each may import those before it. The two in the middle are files of the root; commands may import all.
ORDER = ("options", "launch", "quantization", "files", "data", "models", "parallel", "quantize_layers",
         "wrapping", "monitoring", "checkpoints", "training", "finished")  # fmt: skip
COMMANDS = {"train", "generate", "evaluate", "export", "block_expansion", "report", "plan", "sweep"}
LONGEST = 12  # files in a chain of imports


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {
    module_name(path): path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0].removesuffix(".py") in {*ORDER, *COMMANDS}
}


@cache
def imported(module: str) -> frozenset[str]:
    """Return the modules of this program that a module imports, also within its functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found & FILES.keys() - {module})


def chain(module: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the longest chain of imports that begins with this module."""
    assert module not in above, f"a circle: {' -> '.join((*above, module))}"
    below = (chain(each, (*above, module)) for each in sorted(imported(module)))
    return (module, *max(below, key=len, default=()))


def test_packages_import_those_before_them():
    order = {name: i for i, name in enumerate(ORDER)}
    packages = {module: module.partition(".")[0] for module in FILES}
    wrong = [
        f"{module} imports {each}"
        for module, package in packages.items()
        for each in imported(module)
        if package in order
        and packages[each] != package
        and order.get(packages[each], len(ORDER)) > order[package]
    ]
    assert wrong == []


def test_chains_of_imports_are_short_and_end():
    longest = max((chain(module) for module in sorted(FILES)), key=len)
    assert len(longest) <= LONGEST, " -> ".join(longest)


def test_the_root_shows_the_architecture():
    assert {path.stem for path in ROOT.glob("*.py")} == COMMANDS | {"quantize_layers", "wrapping"}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks", "tools"}
    assert packages == set(ORDER) - {"quantize_layers", "wrapping"}
    for package in packages:
        words = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")))
        assert words and "May import:" in words and "Start in " in words, package


@pytest.mark.parametrize("package", [name for name in ORDER if (ROOT / name).is_dir()])
def test_a_package_imports_what_it_says(package):
    words = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")))
    said = set(re.findall(r"\w+", words.partition("May import:")[2].partition("Start in ")[0])) & {*ORDER} - {
        package
    }
    used = {each.partition(".")[0] for m in FILES if m.startswith(f"{package}.") for each in imported(m)}
    assert used - {package} <= said <= set(ORDER[: ORDER.index(package)])
