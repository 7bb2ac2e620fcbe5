"""Find the source of a data set and read its rows.

A source is a recipe of datasets/, a user's own file or folder, or the Hugging Face hub. Everything that is
missing or malformed ends here as a UserError of one line, which names the file and the line.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.formats import FORMATS, GUANACO_MARKERS
from data.hub_sets import read_folder, read_hub
from data.row_files import Rows, check_file_type, read_file
from options.data_files import KINDS, READABLE, conversion_advice, file_suffix
from options.errors import UserError
from options.limits import MAX_OPTIONS_BYTES, check_size, read_text

RECIPE_FOLDER = Path(__file__).parents[1] / "datasets"


@dataclass(frozen=True)
class Recipe:
    """A recipe: a TOML file that says where rows come from and how they are read.

    Attributes: the keys of the TOML file, and root.
        source: a hub id, or a file or folder beside the recipe.
        split: the split of a hub id or folder to read.
        data_files: a pattern for the files of a hub id or folder; "" = all of the split.
        format: a name of FORMATS; "auto" = recognise it.
        samples: rows used unless --dataset_samples says otherwise; -1 = all.
        columns: {a column of the format: the data set's name for it}.
        markers: texts that begin the turns of the two speakers in a guanaco text.
        fill: one row, whose output is repeated until it fills the context; instead of a source.
        root: the folder of the recipe, if it reads a folder beside it; not a key.
    """

    source: str = ""
    split: str = "train"
    data_files: str = ""
    format: str = "auto"
    samples: int = -1
    columns: dict[str, str] = field(default_factory=dict)
    markers: list[str] = field(default_factory=lambda: list(GUANACO_MARKERS))
    fill: dict[str, str] = field(default_factory=dict)
    root: str | None = None


def find_recipe(dataset: str) -> tuple[Recipe, Path | None]:
    """Return (the recipe of --dataset, the local file that it reads or None).

    A file, folder or hub id that is no recipe gets a recipe with defaults. Raises UserError for unknown
    names.
    """
    local = os.path.expanduser(dataset)  # os.path takes any text, where Path raises for some
    path = Path(local) if file_suffix(local) == ".toml" else find_shipped_recipe(dataset)
    if path is not None:
        return _locate_source(_read_recipe(path), path.parent)
    if os.path.isdir(local):
        return Recipe(source=local), None
    if file_suffix(local) in KINDS:
        return Recipe(source=dataset), Path(local)
    if os.path.isfile(local):
        check_file_type(Path(local))
    if (
        dataset.startswith((".", "/", "~"))
        or dataset.count("/") > 1
        or dataset.endswith("/")
        or conversion_advice(local)
    ):
        raise UserError(f"--dataset {dataset}: no such file or folder")
    if dataset.count("/") == 1:
        return Recipe(source=dataset), None
    names = ", ".join(sorted(p.stem for p in RECIPE_FOLDER.glob("*.toml")))
    raise UserError(
        f"--dataset {dataset}: not a recipe ({names}), a {READABLE} file, a folder or a hub id (owner/name)"
    )


def find_shipped_recipe(dataset: str) -> Path | None:
    """Return the file in datasets/ of the recipe that --dataset names; None if it names something else."""
    path = RECIPE_FOLDER / f"{dataset}.toml"
    return path if os.path.basename(dataset) == dataset and os.path.isfile(path) else None


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
    if not (recipe.source + recipe.data_files).isprintable():  # a NUL
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
    if ".." in recipe.data_files.split("/") or os.path.isabs(recipe.data_files) or "://" in recipe.data_files:
        raise UserError(f"{error_prefix}: data_files {recipe.data_files} leads out of the data set")


def load_rows(recipe: Recipe, file: Path | None, samples: int) -> Rows:
    """Return the first `samples` rows of a recipe, with its columns renamed; -1 = all rows.

    Raises UserError for data that is missing, empty or malformed, and for a column that no row has.
    """
    if recipe.fill:
        return Rows([recipe.fill] * max(samples, 1), ["dummy"] * max(samples, 1))
    if file:
        rows = read_file(file)
    elif os.path.isdir(recipe.source):
        rows = read_folder(recipe.source, recipe.data_files, recipe.split, samples, recipe.root)
    else:
        rows = read_hub(recipe.source, recipe.data_files, recipe.split, samples)
    if samples > 0:
        rows = Rows(rows.rows[:samples], rows.origins[:samples], rows.remarks)
    if not rows.rows:
        raise UserError(f"--dataset {file or recipe.source}: is empty")
    for theirs in recipe.columns.values():
        if not any(theirs in row for row in rows.rows):
            raise UserError(f"--dataset {file or recipe.source}: no column {theirs}, which the recipe names")
    renamed = [
        row | {ours: row[theirs] for ours, theirs in recipe.columns.items() if theirs in row}
        for row in rows.rows
    ]
    return Rows(renamed, rows.origins, rows.remarks)
