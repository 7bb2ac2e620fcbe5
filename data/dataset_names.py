"""Take the values of --dataset and of options like it apart: mixtures, parts of a hub set, patterns of files.

What exists as a file or folder is a name as it stands, whatever characters it has. Nothing is read here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from options.errors import UserError
from options.limits import MAX_MIXED_SETS, MAX_WEIGHT

RECIPE_FOLDER = Path(__file__).parents[1] / "datasets"
PATTERN_CHARACTERS = "*?["
REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # a branch, a tag, a commit, or refs/pr/1
NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True)
class DatasetName:
    """A data set as --dataset names it: base:config:split@revision, of which all but the base may be missing.

    Attributes:
        base: a recipe, a file, a folder, a pattern of files or a hub id.
        config: the configuration of a hub set or folder; "" = not named, like the others.
        split: the split of a hub set or folder.
        revision: the branch, tag or commit of a hub set.
    """

    base: str
    config: str = ""
    split: str = ""
    revision: str = ""

    def __str__(self) -> str:
        parts = f":{self.config}:{self.split}".rstrip(":")
        return self.base + parts + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Share:
    """A set of a mixture: its name, and its weight as text; "" = no set of the mixture has one."""

    name: str
    number: str = ""

    @property
    def weight(self) -> Fraction | None:
        """The weight, without rounding."""
        return Fraction(self.number) if self.number else None

    def __str__(self) -> str:
        return f"{self.name}*{self.number}" if self.number else self.name


def find_shipped_recipe(name: str) -> Path | None:
    """Return the file in datasets/ of the recipe with this name; None if there is none."""
    path = RECIPE_FOLDER / f"{name}.toml"
    return path if os.path.basename(name) == name and os.path.isfile(path) else None


def split_name(text: str) -> DatasetName:
    """Return the parts of one data set's name. Raises UserError for a split that is no plain name."""
    name = _take_apart(text)
    if name.split and not re.fullmatch(r"\w+(\.\w+)*", name.split):
        raise UserError(
            f"--dataset {text}: {name.split} is not the name of one split; --dataset_samples takes the first"
            f" rows, and a comma joins splits: {name.base}::train,{name.base}::test"
        )
    return name


def _take_apart(text: str) -> DatasetName:
    """Return the parts of one data set's name, whatever they are."""
    if _exists(text) or "://" in text:
        return DatasetName(text)
    rest, at, revision = text.rpartition("@")
    if not at or not REVISION.fullmatch(revision):
        rest, revision = text, ""
    pieces = rest.split(":")
    bases = [":".join(pieces[:count]) for count in range(len(pieces), 0, -1)]
    base = next((base for base in bases if _is_there(base, ":")), pieces[0])
    config, _, split = rest[len(base) + 1 :].partition(":")
    return DatasetName(base, config, split, revision)


def pin_commit(text: str, commit: str) -> str:
    """Return a set's name with the commit as its revision; unchanged if the commit is ""."""
    return str(replace(_take_apart(text), revision=commit)) if commit else text


def split_pattern(path: str) -> tuple[str, str] | None:
    """Return (folder, pattern of files in it) of a path such as data/train-*.parquet; None for other paths.

    The folder takes as much of the path as exists, so `*` in the name of a folder that exists means itself.
    """
    parts = os.path.expanduser(path).split("/")
    for count in range(len(parts) - 1, -1, -1):
        folder = "/".join(parts[:count]) or ("/" if count else ".")
        pattern = "/".join(parts[count:])
        if os.path.isdir(folder):
            return (folder, pattern) if {*pattern} & {*PATTERN_CHARACTERS} else None
    return None


def split_mixture(text: str) -> list[Share]:
    """Return the sets of a mixture such as a*0.7,b*0.3 or a,b; a single set if the text names one.

    A number after the last `*` of a set is its weight. Spaces around names and weights do not count. A comma
    in the name of a file or folder that exists does not separate. Raises UserError for weights that are no
    positive numbers or that some sets lack, for a set that is named twice, and for an empty name.
    """
    if _exists(text):
        return [Share(text)]
    shares = [_split_weight(part, text) for part in map(_strip, _split_at_commas(text))]
    names = [share.name for share in shares]
    if len(shares) == 1:
        if shares[0].number:
            raise UserError(f"--dataset {text}: a weight has no effect on a set alone; leave it out")
        return shares
    if "" in names:
        raise UserError(f"--dataset {text}: a set's name is missing beside a comma")
    if len({bool(share.number) for share in shares}) > 1:
        missing = next(share.name for share in shares if not share.number)
        raise UserError(
            f"--dataset {text}: {missing} has no weight; give all sets one, as in a*0.7,b*0.3, or none"
        )
    first_names: dict[DatasetName, str] = {}
    for name in names:
        if first := first_names.get(_identify(name)):
            other = f" (as {first})" if first != name else ""
            raise UserError(
                f"--dataset {text}: {name} is named twice{other}; a larger weight repeats its rows"
            )
        first_names[_identify(name)] = name
    return shares


def _identify(text: str) -> DatasetName:
    """Return a set's name such that other spellings of the same set give the same one.

    Files, folders and recipes are known by their path without links. The parts that a name leaves out are
    those that are read by default.
    """
    name = _take_apart(text)
    recipe = find_shipped_recipe(name.base)
    if recipe or _exists(name.base):
        base = os.path.realpath(recipe or os.path.expanduser(name.base))
    elif pattern := split_pattern(name.base):
        base = os.path.join(os.path.realpath(pattern[0]), os.path.normpath(pattern[1]))
    else:
        base = name.base
    is_recipe = base.endswith(".toml")  # it may name another split and revision
    defaults = {"split": name.split or "train", "revision": name.revision or "main"}
    return replace(name, base=base, **({} if is_recipe else defaults))


def first_set(text: str) -> str:
    """Return the name of the first set of a mixture, whose format and markers all of them have."""
    return split_mixture(text)[0].name


def without_weights(text: str) -> str:
    """Return a recorded mixture without its weights; unchanged if files of it were moved."""
    try:
        return ",".join(share.name for share in split_mixture(text))
    except UserError:
        return text


def make_name_absolute(text: str) -> str:
    """Return a value of --dataset with absolute paths of files and folders; other names stay as they are."""
    shares = split_mixture(text)
    return ",".join(str(Share(_make_absolute(share.name), share.number)) for share in shares)


def _make_absolute(text: str) -> str:
    name = split_name(text)
    if find_shipped_recipe(name.base):
        return text
    if _exists(name.base):
        base = os.path.abspath(os.path.expanduser(name.base))
    elif pattern := split_pattern(name.base):
        base = os.path.join(os.path.abspath(pattern[0]), pattern[1])
    else:
        return text
    return str(replace(name, base=base))


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _strip(part: str) -> str:
    """Return a part of a mixture without the spaces around it, unless they are in the name of a file."""
    return part if _exists(part) else part.strip()


def _split_at_commas(text: str) -> list[str]:
    """Return the parts of a mixture, each as long as an existing name with commas in it makes it."""
    pieces, parts = text.split(","), []
    if len(pieces) > MAX_MIXED_SETS:
        raise UserError(
            f"--dataset {text[:80]}...: names {len(pieces):,} sets; at most {MAX_MIXED_SETS} are mixed"
        )
    while pieces:
        counts = range(len(pieces), 1, -1)
        count = next((n for n in counts if _is_name_with_commas(",".join(pieces[:n]))), 1)
        parts.append(",".join(pieces[:count]))
        pieces = pieces[count:]
    return parts


def _is_name_with_commas(part: str) -> bool:
    """Return whether a part of a mixture is one name, whose commas belong to a file or folder that exists."""
    part = _strip(part)
    head, _, tail = part.rpartition("*")
    base = _take_apart(head if NUMBER.fullmatch(tail) and not _exists(part) else part).base
    return "," in base and _is_there(base, ",")


def _is_there(base: str, separator: str) -> bool:
    """Return whether a file or folder exists, or of a pattern the folder, which has all separators in it."""
    pattern = split_pattern(base)
    return _exists(base) or bool(pattern and separator not in pattern[1])


def _split_weight(part: str, text: str) -> Share:
    """Return a part of the mixture `text` as a Share. Raises UserError for a weight that is not positive."""
    name, star, number = part.rpartition("*")
    name, number = _strip(name), number.strip()
    if not star or not name or _exists(part) or not NUMBER.fullmatch(number):
        return Share(part)
    if not 1 / MAX_WEIGHT <= float(number) <= MAX_WEIGHT:  # NaN is neither
        raise UserError(
            f"--dataset {text}: the weight {number} of {name} is not a positive number, from"
            f" {1 / MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
        )
    return Share(name, number)
