"""What another program's configuration says about its data sets, and access to its nested values."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from options.errors import UserError
from options.foreign import is_off
from options.foreign_files import ForeignFile
from options.foreign_rows import name_set
from options.foreign_rules import FOREIGN
from options.yaml_file import Tree

SPLIT = re.compile(r"\w+(\.\w+)*")  # a whole split; slices such as train[:20%] are not read
MESSAGE_KEYS = (("role", "content"), ("from", "value"))  # both are read
LONGEST_VALUE = 60  # characters of a value in a comment
SECRET = re.compile(r"(hub|auth|hf|access|api)_(token|key)|secret|password", re.IGNORECASE)


@dataclass
class Data:
    """What a configuration says about its rows.

    Attributes:
        options: options here, {name: value}.
        notes: what was decided.
        lost: what has no equal.
        read: keys at the top of the file that are accounted for.
        settings: settings that were found deeper in the file, {foreign name: value}.
        columns: {column of the format: the data's name for it}; None = no set was read so far.
        form: the format of the sets, "" = their columns tell it; None = no set was read so far.
    """

    options: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    settings: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] | None = None
    form: str | None = None

    def add_form(self, name: str, form: str, columns: Mapping[str, str]) -> None:
        """Record how a set is read. One run has one format and one --columns: those of the first set.

        Args:
            name: the set, as comments call it.
            form: its format; "" = its columns tell it.
            columns: {column of the format: the data's name for it}; "" = the same.
        """
        renamed = {ours: theirs for ours, theirs in columns.items() if theirs not in ("", ours)}
        if self.columns is None or self.form is None:
            self.columns, self.form = renamed, form
            return
        if form != self.form:
            other, first = form or "told by its columns", self.form or "told by its columns"
            self.lost.append(
                f"{name}: format: {other}; of the first set: {first}: all sets of a run have one"
            )
        if renamed != self.columns:
            written = ",".join(f"{ours}={theirs}" for ours, theirs in renamed.items()) or "not renamed"
            self.lost.append(
                f"{name}: columns: {written}: --columns counts for all sets; rename them in the file, or give"
                " each set as a recipe with its own `columns` (docs/data.md)"
            )

    def name_set(self, base: str, config: str = "", split: str = "", revision: str = "") -> str:
        """Return a data set as --dataset names it: base:config:split@revision."""
        if split and not SPLIT.fullmatch(split):
            self.lost.append(
                f"{base}: split {split}: whole splits are read; --dataset_samples reads fewer rows"
            )
            split = split.partition("[")[0].partition("+")[0]
        return name_set(base, config, split, revision)

    def report_unread(self, name: str, entry: Mapping[str, Tree], read: Collection[str]) -> None:
        """Record the keys of an entry that were not read, unless they are switched off or need no equal.

        Args:
            name: the set, as comments call it.
            entry: its description.
            read: the keys that were read.
        """
        for key, value in entry.items():
            text = describe_value(key, value)
            if key in read or is_off(text):
                continue
            rule = FOREIGN.by_name.get(key)
            translation = rule.apply({key: text}) if rule else None
            if translation is None or translation.lost or translation.options:
                reason = f": {translation.note}" if translation and translation.lost else ""
                self.lost.append(f"{name}: {key}: {text}{reason}")


def describe_value(name: str, value: Tree) -> str:
    """Return the value of a setting for a comment: short, and not a secret."""
    if SECRET.search(name):
        return "(not shown)"
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {describe_value(key, each)}" for key, each in value.items()) + "}"
    elif isinstance(value, list):
        text = ",".join(describe_value("", each) for each in value)
    else:
        text = value or ""
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def as_text(value: Tree) -> str:
    """Return a scalar, or the first item of a list, as text; "" for anything else."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) else ""


def as_texts(value: Tree) -> list[str]:
    """Return the texts of a list, or of a text with commas."""
    parts = value if isinstance(value, list) else as_text(value).split(",")
    return [part.strip() for part in parts if isinstance(part, str) and part.strip()]


def as_mapping(value: Tree) -> dict[str, Tree]:
    """Return a mapping, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def as_mappings(file: ForeignFile, key: str, value: Tree) -> list[dict[str, Tree]]:
    """Return a list of mappings. Raises UserError if it is something else."""
    entries = value if isinstance(value, list) else [value] if value is not None else []
    mappings = [each for each in entries if isinstance(each, dict)]
    if len(mappings) < len(entries):
        raise UserError(f"{file.path}: {key}: expected a list of `path: ...`")
    return mappings
