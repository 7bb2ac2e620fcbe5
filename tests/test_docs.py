"""The docs agree with the code."""

from __future__ import annotations

import re
import textwrap

import pytest
import torch
from transformers import ArceeConfig

from models.registry import FAMILIES
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.expansion import expand
from tests.helpers.logits import IDS, transformers_logits
from tests.helpers.programs import ROOT
from tests.helpers.runs import outputs, transformers_model
from tools import make_data_doc, make_hardware_table, make_migrate_doc
from tools.families.derive import derive
from tools.families.tiny_model import make_tiny_model
from tools.make_options_doc import PAGE, make_page

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DESIGN = ROOT / "docs" / "design"
# The pages whose names of files and of things in the code are checked.
DESIGN_PAGES = [ROOT / "docs" / "architecture.md", *sorted(DESIGN.glob("*.md"))]
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
FILE_NAME = r"(?<![\w<./-])(?:[\w.]+/)+(?:[\w-]+\.(?:py|toml|md))?(?![\w<])|(?<![\w<./-])[\w-]+\.py\b"
# Names of libraries, in backticks, that are not in this code.
FOREIGN = {"AutoPeftModel", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"}


def test_the_options_page_is_config_py():
    assert PAGE.read_text(encoding="utf-8") == make_page(), "run: python -m tools.make_options_doc"


def test_the_tables_of_the_data_page_are_the_code():
    page = make_data_doc.PAGE.read_text(encoding="utf-8")
    assert page == make_data_doc.replace_tables(page), "run: python -m tools.make_data_doc"


def test_the_tables_of_other_programs_are_foreign_rules_py():
    page = make_migrate_doc.PAGE.read_text(encoding="utf-8")
    expected = make_migrate_doc.replace_tables(page, make_migrate_doc.make_tables())
    assert page == expected, "run: python -m tools.make_migrate_doc"


def test_links_lead_to_files_and_headings():
    for doc in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", doc.read_text(encoding="utf-8")):
            path = doc.parent / target if target else doc
            assert path.exists(), f"{doc.name} links to {target}"
            found = anchors(path.read_text(encoding="utf-8")) if anchor else {""}
            assert anchor in found, f"{doc.name} links to {target}#{anchor}"


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_page_is_linked_from_the_map():
    linked = re.findall(r"\]\((design/\w+\.md)", DESIGN_PAGES[0].read_text(encoding="utf-8"))
    assert {f"design/{page.name}" for page in DESIGN.glob("*.md")} == set(linked)


def test_files_that_the_design_pages_name_exist():
    for doc in DESIGN_PAGES:
        text = re.sub(r"\]\([^)]*\)", "]", doc.read_text(encoding="utf-8"))
        named = [name.rstrip(".") for name in re.findall(FILE_NAME, text)]
        folders = ROOT, doc.parent, ROOT / "models"  # adding.md has names of files in models/
        missing = {name for name in named if not any((folder / name).exists() for folder in folders)}
        assert missing == set(), (doc.name, missing)


def test_names_that_the_design_pages_quote_are_in_the_code():
    paths = [
        *ROOT.glob("*.py"),
        *(p for folder in (*PACKAGES, "tests", "tools", "notebooks") for p in (ROOT / folder).rglob("*.py")),
    ]
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    known = {*re.findall(r"\w+", code), *(path.stem for path in paths), *FOREIGN}
    for doc in DESIGN_PAGES:
        text = re.sub(r"```.*?```", "", doc.read_text(encoding="utf-8"), flags=re.DOTALL)
        quoted = set(re.findall(r"[A-Za-z_]\w+", " ".join(re.findall(r"`([^`\n]+)`", text))))
        assert quoted <= known, (doc.name, quoted - known)


@pytest.mark.slow
def test_the_hardware_page_has_what_is_computed():
    page = make_hardware_table.PAGE.read_text(encoding="utf-8")
    expected = make_hardware_table.replace_tables(page, make_hardware_table.make_tables())
    assert page == expected, "run: python -m tools.make_hardware_table"


def test_the_list_of_files_is_complete_and_has_each_once():
    page = (DESIGN / "files.md").read_text(encoding="utf-8").partition("## What the commands call")[0]
    cells = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)
    listed = [name for cell in cells if cell != "file" for name in cell.split(", ")]
    paths = [
        *ROOT.glob("*.py"),
        *(p for folder in (*PACKAGES, "tools", "notebooks") for p in (ROOT / folder).glob("*.py")),
    ]
    written = {path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py"}
    folders = {
        "data/templates/",
        "models/toy_base/",
        "models/toy_vision/",
        "monitoring/templates/",
        "benchmarks/peers/",
        "tools/families/",
    }
    assert sorted(listed) == sorted(written | folders)


def test_rows_of_tables_are_in_a_table():
    """A blank line ends a table: rows after it are plain text."""
    for doc in PAGES:
        for block in doc.read_text(encoding="utf-8").split("\n\n"):
            first, second = ([line for line in block.splitlines() if line.startswith("|")] + ["", ""])[:2]
            assert not first or re.fullmatch(r"[|-]+", second), f"{doc.name}: {first}"


def test_datasets_holds_no_python():
    """A package of that name would shadow Hugging Face's."""
    assert not list((ROOT / "datasets").rglob("*.py"))


def test_the_example_of_a_new_family_works(alpaca_file, one_rank, tmp_path, monkeypatch):
    """The file, the name and the tiny config, as in the docs: step 0 of its 4-bit model, and an expanded one.

    The file is what tools.try_family prints. Layers are marked for compilation, as on GPUs.
    """
    page = (ROOT / "docs" / "adding_a_family.md").read_text(encoding="utf-8")
    source = textwrap.dedent(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    name, config = re.search(r'`"(\w+)": lambda: (.*),`', page).groups()
    assert f'`"{name}": {name}.FAMILY,`' in page
    config = eval(config, {"ArceeConfig": ArceeConfig, "_COMMON": tiny._COMMON})
    assert source == derive(make_tiny_model(config)).source()
    monkeypatch.setitem(tiny.CONFIGS, name, lambda: config)
    folder = tiny.save_checkpoint(name, tmp_path / name)
    ours, state, adapters = one_rank(
        step_zero_of_a_new_family,
        name,
        source,
        args_for(folder, alpaca_file, "bnb_dora", "--compile", "true"),
    )[0]
    assert {n.split(".", 3)[3].rpartition(".")[0] for n in adapters} == {
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        "mlp.up_proj",
        "mlp.down_proj",
    }
    with torch.no_grad():
        torch.testing.assert_close(
            ours, transformers_model(folder, state)(input_ids=IDS).logits, rtol=1e-5, atol=1e-5
        )
    exec(source, module := {})
    monkeypatch.setitem(FAMILIES, name, module["FAMILY"])
    expanded = expand(folder, tmp_path / "expanded", "--new_blocks", 2)
    assert torch.equal(transformers_logits(expanded), transformers_logits(folder))


def step_zero_of_a_new_family(rank_info, name, source, args):
    exec(source, module := {})
    FAMILIES[name] = module["FAMILY"]
    try:
        return outputs(rank_info, args, IDS, False)
    finally:
        del FAMILIES[name]


def test_the_docs_name_every_family():
    page = (DESIGN / "adding.md").read_text(encoding="utf-8")
    listed = re.search(r"Known values of `model_type` in config.json: (.*?)\. ", page, re.DOTALL)[1]
    assert re.findall(r"`(\w+)`", listed) == list(FAMILIES)
