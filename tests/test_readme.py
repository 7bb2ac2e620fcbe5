"""README.md, and commands and links of all pages: options, headings and figures exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from options.train import parse as parse_train_options
from tests.helpers.programs import ROOT
from tools.make_readme_picture import PICTURE, SYSTEMS, draw

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("train", "generate", "evaluate", "export", "block_expansion", "report", "plan", "sweep")
# 12,296; 9.57; 74 s. Not the numbers of dates, models and GPUs.
FIGURE = re.compile(r"\d+(?:,\d{3})+|\d+\.\d+|\d+ s\b")


def commands(page: str) -> list[list[str]]:
    """Return the command lines of our programs in a page's indented blocks, split into words.

    Lines with `...` leave something out, and are left out here.
    """
    lines = re.findall(
        r"^ {4}(?:\S*torchrun .*?|\S*python )(\w+\.py .*)$", page.replace("\\\n", " "), re.MULTILINE
    )
    return [shlex.split(line, comments=True) for line in lines if "..." not in line]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def stands_in(figure: str, text: str) -> bool:
    """Whether the text has the figure, not as a part of a longer number."""
    return bool(re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d]|[.,]\d)", text))


MEASURED = [cells(row) for row in README.splitlines() if re.search(r"\| \[\d{4}-\d\d-\d\d\]\(", row)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_options_that_exist(page):
    for program, *argv in commands(page.read_text(encoding="utf-8")):
        name = program.removesuffix(".py")
        assert name in PROGRAMS, program
        if "--config" in argv:  # a file of the reader's
            at = argv.index("--config")
            argv = argv[:at] + argv[at + 2 :]
            importlib.import_module(f"options.{name}").COMMAND.read(argv)
        elif name == "train":
            parse_train_options(argv)
        else:
            importlib.import_module(f"options.{name}").COMMAND.read(argv)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_anchors_are_headings(page):
    for file, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / file if file else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, anchor


def test_the_readme_has_commands_to_check():
    named = {program for program, *_ in commands(README)}
    assert named == {f"{name}.py" for name in PROGRAMS if name != "report"} and len(commands(README)) >= 12


def test_the_table_of_commands_has_all_programs():
    table = README.partition("## Which command do I need?")[2].partition("\n## ")[0]
    assert all(f"python {name}.py" in table for name in PROGRAMS) and "python -m benchmarks.run" in table


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row[0])
def test_figures_stand_on_the_page_that_the_row_links_to(row):
    page = ROOT / re.search(r"\(([^)#]+)", row[-1])[1]
    text = page.read_text(encoding="utf-8")
    figures = [figure for cell in row[1:-1] for figure in FIGURE.findall(cell)]
    assert figures and [figure for figure in figures if not stands_in(figure, text)] == []


def test_the_table_has_all_its_rows():
    assert len(MEASURED) == 15


def test_the_picture_shows_figures_of_the_docs():
    docs = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "README.md")
    for system in SYSTEMS:
        for point in system.points:
            for figure in (f"{point.tokens_per_second:,}", str(point.peak_gib)):
                assert stands_in(figure, docs), figure


def test_the_picture_is_what_the_script_draws(tmp_path: Path):
    """Its words and figures, in their order: lines and curves differ between versions of matplotlib."""
    draw(tmp_path / "picture.svg")
    drawn, kept = (
        re.findall(r"<text[^>]*>(.*?)</text>", path.read_text(encoding="utf-8"), re.DOTALL)
        for path in (tmp_path / "picture.svg", PICTURE)
    )
    assert drawn == kept and len(kept) > 20
