"""Try a model_type of transformers that is not in the list: derive its Family and compare it.

    python -m tools.try_family arcee                              print its file, and what differs
    python -m tools.try_family arcee --out models/arcee.py        write the file if nothing differs
    python -m tools.try_family arcee --family models/arcee.py     compare with a file as it is, after an edit
    python -m tools.try_family stablelm --set qk_layernorm=true   compare with another value of the config

A tiny random model of the type is made from transformers' own config class; nothing is downloaded. The exit
status is 0 if all results are equal, 1 if some differ, 2 for a type that cannot be tried.
docs/adding_a_family.md explains the output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch.distributed as dist
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.utils import logging

from files.atomic_writes import write_text
from launch.ranks import join_process_group
from models.family import Family
from models.registry import CONFIG_ERRORS, FAMILIES
from models.unsupported import explain_unlisted_type, find_lacking_part
from options.errors import DONE, FAILED, REFUSED, UserError, describe
from tests.helpers.tiny import write_alpaca
from tools.families.checks import Subject, run_checks
from tools.families.derive import derive, describe_differences
from tools.families.draft import Draft, family_from_source
from tools.families.tiny_model import find_untried_switches, make_tiny_model, save_tiny_model, tiny_config


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options. An unknown one ends the program with status 2."""
    parser = argparse.ArgumentParser(prog="python -m tools.try_family", description=__doc__.splitlines()[0])
    parser.add_argument("model_type", help="of config.json, such as arcee")
    parser.add_argument("--out", type=Path, help="file to write if nothing differs, such as models/arcee.py")
    parser.add_argument("--family", type=Path, help="file of models/ to compare instead of a derived one")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="value of the tiny model's config, as JSON, such as one of a released config.json; repeatable",
    )
    return parser.parse_args(argv)


def read_changes(settings: list[str]) -> dict[str, Any]:
    """Return {name: value} of the arguments of --set. A value that is not JSON is a string."""
    changes = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not (name and equals):
            raise UserError(f"--set {setting}: expected NAME=VALUE")
        try:
            changes[name] = json.loads(text)
        except ValueError:
            changes[name] = text
    return changes


def make_model(model_type: str, changes: dict[str, Any]) -> PreTrainedModel:
    """Return a tiny model of the type. Raises UserError if it is unknown, or of another kind.

    changes: values of its config.
    """
    if model_type not in CONFIG_MAPPING:
        similar = get_close_matches(model_type.lower(), CONFIG_MAPPING, n=3)
        raise UserError(
            f"model_type {model_type!r} is unknown to the installed transformers {transformers.__version__}"
            + (f"; similar: {', '.join(similar)}" if similar else "")
        )
    try:
        config = CONFIG_MAPPING[model_type]()
    except CONFIG_ERRORS as e:
        raise UserError(
            f"model_type {model_type!r}: transformers has no default config ({describe(e)})"
        ) from None
    if find_lacking_part(config):
        raise UserError(explain_unlisted_type(config, list(FAMILIES)))
    return make_tiny_model(tiny_config(model_type, changes))


def find_source(options: argparse.Namespace, model: PreTrainedModel) -> tuple[str, list[str]]:
    """Return (the source of the family to compare, what must be written before that), and print both.

    Raises UserError for a model that no family can describe, or whose modules are not understood.
    """
    if options.family:
        return options.family.read_text(encoding="utf-8"), []
    try:
        draft: Draft = derive(model)
    except (
        LookupError,
        AttributeError,
        AssertionError,
        ValueError,
        TypeError,
        RuntimeError,
        StopIteration,
    ) as e:
        raise UserError(
            f"{type(model).__name__}: its modules are not understood ({describe(e)}); write the file by hand"
            " and compare it with --family"
        ) from None
    source = draft.source()
    print(source)
    for remark in draft.remarks:
        print(f"# {remark}")
    if known := FAMILIES.get(options.model_type):
        found = describe_differences(draft.family(), known, model.config.get_text_config())
        print("\n".join(f"# not as in the registry: {line}" for line in found) or "# as in the registry")
    sys.stdout.flush()  # the comparisons take a minute
    return source, draft.missing


@contextmanager
def registered(model_type: str, family: Family) -> Iterator[None]:
    """Let the program know a family, in the place of the registry's, within this context."""
    known = FAMILIES.get(model_type)
    FAMILIES[model_type] = family
    try:
        yield
    finally:
        if known:
            FAMILIES[model_type] = known
        else:
            del FAMILIES[model_type]


def compare(source: str, options: argparse.Namespace, model: PreTrainedModel) -> bool:
    """Run all comparisons, print a line of each, and return whether all results are equal."""
    family, equal = family_from_source(source), True
    with tempfile.TemporaryDirectory() as name, registered(options.model_type, family):
        folder = save_tiny_model(model, Path(name, options.model_type))
        data = write_alpaca(Path(name, "rows.jsonl"))
        rank_info = join_process_group(0, 1, 0, dist.HashStore())
        subject = Subject(source, family, options.model_type, folder, data, rank_info)
        for check, found in run_checks(subject):
            print(f"{'differs' if found else 'equal':8}{check}" + (f": {found}" if found else ""), flush=True)
            equal = equal and found is None
        dist.destroy_process_group()
    return equal


def main(argv: list[str] | None = None) -> int:
    """Run the tool. argv: the arguments; None: those of the process. Return the exit status."""
    options = parse(argv)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if options.out and options.out.exists():
            raise UserError(f"--out {options.out}: exists; name another file")
        if options.family and not options.family.is_file():
            raise UserError(f"--family {options.family}: no such file")
        model = make_model(options.model_type, read_changes(options.set))
        source, missing = find_source(options, model)
    except UserError as e:
        print(f"error: {describe(e)}", file=sys.stderr)
        return REFUSED
    for text in missing:
        print(f"missing {text}")
    if missing or not compare(source, options, model):
        return FAILED
    if switches := find_untried_switches(model.config):
        print(f"not compared: {' '.join(f'--set {switch}' for switch in switches)}")
    if options.out:
        write_text(options.out, source)
        print(f"wrote {options.out}; docs/adding_a_family.md says what else a family needs")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
