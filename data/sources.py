"""Find the source of a data set and read its rows.

A source is a recipe of datasets/, a user's own file or folder, or the Hugging Face hub. Everything that is
missing or malformed ends here as a UserError of one line, which names the file and the line.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.columns import ColumnNames
from data.dataset_names import (
    RECIPE_FOLDER,
    REVISION,
    DatasetName,
    find_shipped_recipe,
    split_name,
    split_pattern,
)
from data.formats import FORMATS, GUANACO_MARKERS
from data.hub_sets import read_folder, read_hub
from data.image_store import IMAGE_COLUMNS
from data.row_files import Rows, check_file_type, read_file
from options.data_files import KINDS, READABLE, conversion_advice, file_suffix
from options.errors import UserError
from options.limits import MAX_OPTIONS_BYTES, check_size, read_text

# The page of a data set, such as https://huggingface.co/datasets/owner/name/tree/main, or hf://datasets/...
HUB_ADDRESS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)?datasets/([\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/([\w.-]+))?(?=[/?#]|$)"
)


@dataclass(frozen=True)
class Recipe:
    """A recipe: a TOML file that says where rows come from and how they are read.

    Attributes: the keys of the TOML file, and root.
        source: a hub id, or a file or folder beside the recipe.
        split: the split of a hub id or folder to read.
        data_files: a pattern for the files of a hub id or folder; "" = all of the split.
        config: the configuration of a hub id or folder to read; "" = its default one.
        revision: the branch, tag or commit of a hub id to read; "" = its main branch.
        format: what --dataset_format names; "auto" = recognise it.
        samples: rows used unless --dataset_samples says otherwise; -1 = all.
        columns: {a column of the format: the data set's name for it}.
        markers: texts that begin the turns of the two speakers in a guanaco text.
        fill: one row, whose output is repeated until it fills the context; instead of a source.
        root: the folder of the recipe, if it reads a folder beside it; not a key.
    """

    source: str = ""
    split: str = "train"
    data_files: str = ""
    config: str = ""
    revision: str = ""
    format: str = "auto"
    samples: int = -1
    columns: dict[str, str] = field(default_factory=dict)
    markers: list[str] = field(default_factory=lambda: list(GUANACO_MARKERS))
    fill: dict[str, str] = field(default_factory=dict)
    root: str | None = None


def find_recipe(dataset: str) -> tuple[Recipe, Path | None]:
    """Return (the recipe of --dataset, the local file that it reads or None).

    A file, folder, pattern or hub id that is no recipe gets a recipe with defaults. dataset: one set, as
    base:config:split@revision. Raises UserError for unknown names, and for parts that the set cannot have.
    """
    name = split_name(dataset)
    recipe, file = _find_base(name.base, dataset)
    return _apply_parts(recipe, file, name, dataset), file


def _find_base(base: str, dataset: str) -> tuple[Recipe, Path | None]:
    """Return what `find_recipe` does for a name without configuration, split and revision.

    dataset: the whole name, for messages.
    """
    local = os.path.expanduser(base)  # os.path takes any text, where Path raises for some
    path = Path(local) if file_suffix(local) == ".toml" else find_shipped_recipe(base)
    if path is not None:
        return _locate_source(_read_recipe(path), path.parent)
    if os.path.isdir(local):
        return Recipe(source=local), None
    if "://" in base and not os.path.exists(local):
        raise UserError(f"--dataset {dataset}: no such file or folder{_describe_hub_id(base)}")
    if not os.path.exists(local) and (pattern := split_pattern(base)):
        return Recipe(source=pattern[0], data_files=pattern[1]), None
    if file_suffix(local) in KINDS:
        return Recipe(source=base), Path(local)
    if os.path.isfile(local):
        check_file_type(Path(local))
    if (
        base.startswith((".", "/", "~"))
        or base.count("/") > 1
        or base.endswith("/")
        or conversion_advice(local)
    ):
        raise UserError(f"--dataset {dataset}: no such file or folder{_describe_hub_id(base)}")
    if base.count("/") == 1:
        return Recipe(source=base), None
    names = ", ".join(sorted(p.stem for p in RECIPE_FOLDER.glob("*.toml")))
    raise UserError(
        f"--dataset {dataset}: not a recipe ({names}), a {READABLE} file, a folder or a hub id (owner/name)"
    )


def _describe_hub_id(address: str) -> str:
    """Return the end of an error about the address of a data set: the hub id in it; "" if it has none."""
    if match := HUB_ADDRESS.match(address):
        hub_id, revision = match.groups()
        return f"; the hub's data set is {hub_id}{f'@{revision}' if revision else ''}"
    return "; download the file, and give its path" if "://" in address else ""


def _apply_parts(recipe: Recipe, file: Path | None, name: DatasetName, dataset: str) -> Recipe:
    """Return a recipe with the configuration, split and revision of a name. Raises UserError for others.

    file: the file that the recipe reads, or None. dataset: the whole name, for the message.
    """
    parts = {key: value for key in ("config", "split", "revision") if (value := getattr(name, key))}
    is_local = os.path.isdir(recipe.source)
    possible: tuple[str, ...] = ()
    if file or recipe.fill:
        kind = "one file" if file else "a row of its own"
    elif is_local:
        possible, kind = ("split",) if recipe.data_files else ("config", "split"), "a local folder"
    else:
        possible, kind = ("config", "split", "revision"), "a hub set"
    for key, value in parts.items():
        if key not in possible:
            raise UserError(f"--dataset {dataset}: {name.base} is {kind}, which has no {key} {value}")
    return replace(recipe, **parts)


def _locate_source(recipe: Recipe, folder: Path) -> tuple[Recipe, Path | None]:
    """Return (recipe, the file it reads or None), with a source that is a folder beside it as a full path.

    folder: of the recipe.
    """
    if file_suffix(recipe.source) in KINDS:
        return recipe, folder / recipe.source
    if recipe.source and (folder / recipe.source).is_dir():
        return replace(recipe, source=str(folder / recipe.source), root=str(folder)), None
    return recipe, None


def _read_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises UserError for one that is missing, malformed or unusable."""
    error_prefix = f"--dataset {path}"
    check_size(path, MAX_OPTIONS_BYTES)
    try:
        values = tomllib.loads(read_text(path, MAX_OPTIONS_BYTES))
    except OSError as e:
        raise UserError(f"{error_prefix}: {e.strerror}") from None
    # ValueError: not TOML, not UTF-8, or a number of thousands of digits.
    except (ValueError, RecursionError) as e:
        raise UserError(f"{error_prefix}: not a recipe ({' '.join(str(e).split())})") from None
    known = {key: default for key, default in vars(Recipe()).items() if key != "root"}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{error_prefix}: unknown key {key}; a recipe has {', '.join(known)}")
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if type(value) is not type(known[key]) or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{error_prefix}: {key} must be like {known[key]!r}")
    recipe = Recipe(**values)
    if recipe.format not in ("auto", *FORMATS) or len(recipe.markers) != 2 or not all(recipe.markers):
        raise UserError(f"{error_prefix}: format must be one of {', '.join(FORMATS)}, markers two texts")
    if bool(recipe.source) == bool(recipe.fill) or (recipe.fill and "output" not in recipe.fill):
        raise UserError(f"{error_prefix}: needs either a source or a row `fill` with an output")
    _check_source(recipe, path.parent, error_prefix)
    return recipe


def _check_source(recipe: Recipe, folder: Path, error_prefix: str) -> None:
    """Raise UserError if a recipe would read anything but the hub and files in or below its own folder."""
    if not (recipe.source + recipe.data_files + recipe.config + recipe.split).isprintable():  # a NUL
        raise UserError(f"{error_prefix}: source {recipe.source!r} is no name of a file")
    if file_suffix(recipe.source) in KINDS or (recipe.source and (folder / recipe.source).exists()):
        real = Path(os.path.realpath(folder / recipe.source))
        if os.path.isabs(recipe.source) or not real.is_relative_to(os.path.realpath(folder)):
            raise UserError(
                f"{error_prefix}: source {recipe.source} is not beside the recipe; give it as --dataset"
            )
    elif recipe.source and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", recipe.source):
        raise UserError(
            f"{error_prefix}: source {recipe.source!r} is neither a {READABLE} file, a folder beside it nor a"
            " hub id"
        )
    if conversion_advice(recipe.source):
        raise UserError(
            f"{error_prefix}: source {recipe.source}: {file_suffix(recipe.source)} files are not read"
            f" ({READABLE} are); {conversion_advice(recipe.source)}"
        )
    is_file = file_suffix(recipe.source) in KINDS
    if (recipe.config and is_file) or (recipe.revision and (is_file or (folder / recipe.source).exists())):
        raise UserError(
            f"{error_prefix}: config and revision are for a hub id, config also for a folder; source"
            f" {recipe.source} has none"
        )
    if recipe.revision and not REVISION.fullmatch(recipe.revision):
        raise UserError(f"{error_prefix}: revision {recipe.revision!r} is no branch, tag or commit")
    if ".." in recipe.data_files.split("/") or os.path.isabs(recipe.data_files) or "://" in recipe.data_files:
        raise UserError(f"{error_prefix}: data_files {recipe.data_files} leads out of the data set")


def load_rows(
    recipe: Recipe, file: Path | None, samples: int, image_columns: Collection[str] = IMAGE_COLUMNS
) -> Rows:
    """Return the first `samples` rows of a recipe, with its columns renamed; -1 = all rows.

    Args:
        recipe: the recipe.
        file: the file that it reads, or None.
        samples: number of rows.
        image_columns: the data's names of the columns that hold images.

    Raises UserError for data that is missing, empty or malformed, and for a column that no row has.
    """
    if recipe.fill:
        count = max(samples, 1)
        return Rows([recipe.fill] * count, ["dummy"] * count, folders=[""] * count)
    if file:
        rows = read_file(file, image_columns)
    elif os.path.isdir(recipe.source):
        place = (recipe.source, recipe.data_files, recipe.split)
        rows = read_folder(*place, samples, recipe.root, recipe.config, image_columns)
    else:
        parts = {"config": recipe.config, "revision": recipe.revision}
        place = (recipe.source, recipe.data_files, recipe.split)
        rows = read_hub(*place, samples, **parts, image_columns=image_columns)
    if samples > 0:
        rows = rows.first(samples)
    if not rows.rows:
        raise UserError(f"--dataset {file or recipe.source}: is empty")
    names = ColumnNames.from_recipe(recipe.columns)
    return replace(rows, rows=names.rename(rows.rows, f"--dataset {file or recipe.source}")[0])
