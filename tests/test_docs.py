"""The docs agree with the code."""

from __future__ import annotations

import re
import textwrap

import torch
from transformers import Starcoder2Config

from models.registry import FAMILIES
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.expansion import expand
from tests.helpers.logits import IDS, transformers_logits
from tests.helpers.programs import ROOT
from tests.helpers.runs import outputs, transformers_model
from tools.make_options_doc import PAGE, make_page

DESIGN = ROOT / "docs" / "design"


def test_the_options_page_is_config_py():
    assert PAGE.read_text(encoding="utf-8") == make_page(), "run: python -m tools.make_options_doc"


def test_files_that_the_docs_name_exist():
    for doc in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", doc.read_text(encoding="utf-8")):
            assert (doc.parent / target).exists(), f"{doc.name} links to {target}"


def test_rows_of_tables_are_in_a_table():
    """A blank line ends a table: rows after it are plain text."""
    for doc in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for block in doc.read_text(encoding="utf-8").split("\n\n"):
            first, second = ([line for line in block.splitlines() if line.startswith("|")] + ["", ""])[:2]
            assert not first or re.fullmatch(r"[|-]+", second), f"{doc.name}: {first}"


def test_datasets_holds_no_python():
    """A package of that name would shadow Hugging Face's."""
    assert not list((ROOT / "datasets").rglob("*.py"))


def test_the_example_of_a_new_family_works(alpaca_file, one_rank, tmp_path, monkeypatch):
    """The file, the name and the tiny config, as in the docs: step 0 of its 4-bit model, and an expanded one.

    Layers are marked for compilation, as on GPUs.
    """
    page = (DESIGN / "adding.md").read_text(encoding="utf-8").partition("## Adding a model family")[2]
    source = textwrap.dedent(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    name, config = re.search(r'`"(\w+)": lambda: (.*),`', page).groups()
    assert f'`"{name}": {name}.FAMILY,`' in page
    config = eval(config, {"Starcoder2Config": Starcoder2Config, "_COMMON": tiny._COMMON})
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
        "mlp.c_fc",
        "mlp.c_proj",
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
