"""Where rows come from: the recipes of datasets/, a user's own file, the Hugging Face hub.

Whatever is missing or malformed ends here, with its place, as one line for the user.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.formats import FORMATS, GUANACO_MARKERS
from data.hub_sets import read_folder, read_hub
from data.row_files import Rows, check_kind, read_file
from options.data_files import KINDS, READABLE, conversion_advice, file_suffix
from options.errors import UserError
from options.limits import MAX_OPTIONS_BYTES, check_size, read_text

RECIPES = Path(__file__).parents[1] / "datasets"


@dataclass(frozen=True)
class Recipe:
    """A file of datasets/: where rows come from and how they read. Keys as in the TOML file.

    Args:
        source: a hub id, or a file or folder beside the recipe.
        split, data_files: of a hub id or folder: which split is read; a pattern for its files.
        samples: rows used unless --dataset_samples says otherwise.
        columns: {ours: theirs}.
        markers: of the two speakers in a guanaco text.
        fill: one row, whose output is repeated until it fills the context.
        root: no key: the folder where the recipe lies, if it reads a folder beside it.
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
    """(the recipe of --dataset, the local file that it reads or None). Raises UserError for unknown names."""
    local = os.path.expanduser(dataset)  # os.path takes any text, where Path raises for some
    path = Path(local) if file_suffix(local) == ".toml" else shipped_recipe(dataset)
    if path is not None:
        return _at_its_place(_read_recipe(path), path.parent)
    if os.path.isdir(local):
        return Recipe(source=local), None
    if file_suffix(local) in KINDS:
        return Recipe(source=dataset), Path(local)
    if os.path.isfile(local):
        check_kind(Path(local))
    if (
        dataset.startswith((".", "/", "~"))
        or dataset.count("/") > 1
        or dataset.endswith("/")
        or conversion_advice(local)
    ):
        raise UserError(f"--dataset {dataset}: no such file or folder")
    if dataset.count("/") == 1:
        return Recipe(source=dataset), None
    names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
    raise UserError(
        f"--dataset {dataset}: not a recipe ({names}), a {READABLE} file, a folder or a hub id (owner/name)"
    )


def shipped_recipe(dataset: str) -> Path | None:
    """The file in datasets/ of the recipe that --dataset names; None if it names something else."""
    path = RECIPES / f"{dataset}.toml"
    return path if os.path.basename(dataset) == dataset and os.path.isfile(path) else None


def _at_its_place(recipe: Recipe, folder: Path) -> tuple[Recipe, Path | None]:
    """As `find_recipe`, of a recipe that lies in `folder`: its source may be a file or a folder beside it."""
    if file_suffix(recipe.source) in KINDS:
        return recipe, folder / recipe.source
    if recipe.source and (folder / recipe.source).is_dir():
        return replace(recipe, source=str(folder / recipe.source), root=str(folder)), None
    return recipe, None


def _read_recipe(path: Path) -> Recipe:
    where = f"--dataset {path}"
    check_size(path, MAX_OPTIONS_BYTES)
    try:
        given = tomllib.loads(read_text(path, MAX_OPTIONS_BYTES))
    except OSError as e:
        raise UserError(f"{where}: {e.strerror}") from None
    # ValueError: no TOML, no UTF-8, a number of thousands of digits.
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not a recipe ({' '.join(str(e).split())})") from None
    known = {key: default for key, default in vars(Recipe()).items() if key != "root"}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key}; a recipe has {', '.join(known)}")
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if type(value) is not type(known[key]) or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: {key} must be like {known[key]!r}")
    recipe = Recipe(**given)
    if recipe.format not in ("auto", *FORMATS) or len(recipe.markers) != 2 or not all(recipe.markers):
        raise UserError(f"{where}: format must be one of {', '.join(FORMATS)}, markers two texts")
    if bool(recipe.source) == bool(recipe.fill) or (recipe.fill and "output" not in recipe.fill):
        raise UserError(f"{where}: needs either a source or a row `fill` with an output")
    _check_source(recipe, path.parent, where)
    return recipe


def _check_source(recipe: Recipe, folder: Path, where: str) -> None:
    """Raises UserError for a recipe that reads anything but the hub, or what lies beside it or below."""
    if not (recipe.source + recipe.data_files).isprintable():  # a NUL
        raise UserError(f"{where}: source {recipe.source!r} is no name of a file")
    if file_suffix(recipe.source) in KINDS or (recipe.source and (folder / recipe.source).exists()):
        real = Path(os.path.realpath(folder / recipe.source))
        if os.path.isabs(recipe.source) or not real.is_relative_to(os.path.realpath(folder)):
            raise UserError(f"{where}: source {recipe.source} is not beside the recipe; give it as --dataset")
    elif recipe.source and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", recipe.source):
        raise UserError(
            f"{where}: source {recipe.source!r} is neither a {READABLE} file, a folder beside it nor a hub id"
        )
    if conversion_advice(recipe.source):
        raise UserError(
            f"{where}: source {recipe.source}: {file_suffix(recipe.source)} files are not read"
            f" ({READABLE} are); {conversion_advice(recipe.source)}"
        )
    if ".." in recipe.data_files.split("/") or os.path.isabs(recipe.data_files) or "://" in recipe.data_files:
        raise UserError(f"{where}: data_files {recipe.data_files} leads out of the data set")


def load_rows(recipe: Recipe, file: Path | None, samples: int) -> Rows:
    """The first `samples` rows (-1: all). Raises UserError for what is missing, empty or malformed."""
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
