"""The docs say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from tools.make_options_doc import PAGE, page

ROOT = Path(__file__).parent.parent


def test_the_options_page_is_config_py():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tools.make_options_doc"


def test_files_that_the_docs_name_exist():
    for doc in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", doc.read_text(encoding="utf-8")):
            assert (doc.parent / target).exists(), f"{doc.name} links to {target}"


def test_datasets_holds_no_python():
    """A package of that name would shadow Hugging Face's."""
    assert not list((ROOT / "datasets").rglob("*.py"))
