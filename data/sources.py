"""Where rows come from: the recipes of datasets/, a user's own file, the Hugging Face hub.

Whatever is missing or malformed ends here, with its place, as one line for the user.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from data.formats import FORMATS, GUANACO_MARKERS
from options.errors import UserError
from options.limits import LINE, LIST, OPTIONS_FILE, check_size, read_text

RECIPES = Path(__file__).parents[1] / "datasets"
# What `datasets` raises for folders and files that hold no data set, beside errors of its own.
UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
PARQUET_ROWS = 64  # read at once: one value may stand for all of them in the file
FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Recipe:
    """A file of datasets/: where rows come from and how they read. Keys as in the TOML file.

    source: a hub id, or a file beside the recipe; data_files, split: for the hub; samples: rows used unless
    --dataset_samples says otherwise; columns: {ours: theirs}; markers: of the two speakers in a guanaco
    text; fill: one row, whose output is repeated until it fills the context.
    """

    source: str = ""
    split: str = "train"
    data_files: str = ""
    format: str = "auto"
    samples: int = -1
    columns: dict[str, str] = field(default_factory=dict)
    markers: list[str] = field(default_factory=lambda: list(GUANACO_MARKERS))
    fill: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """Raw rows and where each came from, for messages."""

    rows: list[dict]
    places: list[str]


def find_recipe(dataset: str) -> tuple[Recipe, Path | None]:
    """(the recipe of --dataset, the local file that it reads or None). Raises UserError for unknown names."""
    local = os.path.expanduser(dataset)  # os.path takes any text, where Path raises for some
    path = RECIPES / f"{dataset}.toml"
    if local.endswith(".toml") or (os.path.basename(dataset) == dataset and os.path.isfile(path)):
        path = Path(local) if local.endswith(".toml") else path
        recipe = _read_recipe(path)
        return recipe, path.parent / recipe.source if recipe.source.endswith(FILE_TYPES) else None
    if local.endswith(FILE_TYPES):
        return Recipe(source=dataset), Path(local)
    if os.path.isdir(local) or dataset.count("/") == 1:
        return Recipe(source=local), None
    names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
    raise UserError(
        f"--dataset {dataset}: not a recipe ({names}), a {', '.join(FILE_TYPES)} file or a hub id (owner/name)"
    )


def _read_recipe(path: Path) -> Recipe:
    where = f"--dataset {path}"
    check_size(path, OPTIONS_FILE)
    try:
        given = tomllib.loads(read_text(path, OPTIONS_FILE))
    except OSError as e:
        raise UserError(f"{where}: {e.strerror}") from None
    except (
        ValueError,
        RecursionError,
    ) as e:  # ValueError: no TOML, no UTF-8, a number of thousands of digits
        raise UserError(f"{where}: not a recipe ({' '.join(str(e).split())})") from None
    known = vars(Recipe())
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
    if recipe.source.endswith(FILE_TYPES):
        real = Path(os.path.realpath(folder / recipe.source))
        if os.path.isabs(recipe.source) or not real.is_relative_to(os.path.realpath(folder)):
            raise UserError(f"{where}: source {recipe.source} is not beside the recipe; give it as --dataset")
    elif recipe.source and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", recipe.source):
        raise UserError(
            f"{where}: source {recipe.source!r} is neither a {', '.join(FILE_TYPES)} file nor a hub id"
        )
    if ".." in recipe.data_files.split("/") or os.path.isabs(recipe.data_files) or "://" in recipe.data_files:
        raise UserError(f"{where}: data_files {recipe.data_files} leads out of the data set")


def load_rows(recipe: Recipe, file: Path | None, samples: int) -> Rows:
    """The first `samples` rows (-1: all). Raises UserError for what is missing, empty or malformed."""
    if recipe.fill:
        return Rows([recipe.fill] * max(samples, 1), ["dummy"] * max(samples, 1))
    rows = _read_file(file) if file else _read_hub(recipe, samples)
    if samples > 0:
        rows = Rows(rows.rows[:samples], rows.places[:samples])
    if not rows.rows:
        raise UserError(f"--dataset {file or recipe.source}: is empty")
    for theirs in recipe.columns.values():
        if not any(theirs in row for row in rows.rows):
            raise UserError(f"--dataset {file or recipe.source}: no column {theirs}, which the recipe names")
    renamed = [
        row | {ours: row[theirs] for ours, theirs in recipe.columns.items() if theirs in row}
        for row in rows.rows
    ]
    return Rows(renamed, rows.places)


def _read_file(path: Path) -> Rows:
    if not os.path.isfile(path):
        raise UserError(f"--dataset {path}: no such file")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        if path.suffix == ".csv":
            return _read_csv(path)
        if path.suffix == ".json" and _is_list(path):
            return _read_json_list(path)
        return _read_json_lines(path)
    except OSError as e:
        raise UserError(f"--dataset {path}: {e.strerror}") from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text with their ends, which are \\n only: splitlines would also break a row at U+2028 and other
    rare characters. Raises UserError for one that is no UTF-8, or too long."""
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(LINE + 1)
            if not line:
                return
            if len(line) > LINE:
                raise UserError(f"--dataset {path}:{number}: a line of more than {LINE:,} bytes")
            if b"\0" in line:
                raise UserError(f"--dataset {path}:{number}: holds NULs: not a text, or in UTF-16")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"--dataset {path}:{number}: not UTF-8") from None


def _read_json_lines(path: Path) -> Rows:
    rows, places = [], []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            rows.append(_json(line, path, number))
            places.append(f"{path}:{number}")
            if not isinstance(rows[-1], dict):
                raise UserError(f"--dataset {path}:{number}: not a JSON object")
    return Rows(rows, places)


def _json(text: str, path: Path, line: int | None):
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"--dataset {path}:{line or e.lineno}: not JSON ({e.msg})") from None
    except ValueError as e:  # a number of thousands of digits
        raise UserError(f"--dataset {path}:{line or 1}: not usable JSON ({e})") from None
    except RecursionError:
        raise UserError(f"--dataset {path}:{line or 1}: JSON nested too deeply") from None


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(LINE).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _read_json_list(path: Path) -> Rows:
    check_size(path, LIST)
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise UserError(f"--dataset {path}:{line}: not UTF-8") from None
    rows = _json(text, path, None)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"--dataset {path}: entry {i} is not a JSON object")
    return Rows(rows, [f"{path} entry {i}" for i in range(1, len(rows) + 1)])


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(_lines(path), strict=True)
    rows, places = [], []
    try:
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise UserError(f"--dataset {path}:1: the header names a column twice")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"--dataset {path}:{reader.line_num}: another number of columns than the header"
                )
            rows.append(row)
            places.append(f"{path}:{reader.line_num}")
    except csv.Error as e:
        line = reader.reader.line_num  # DictReader counts a line only once it was right
        raise UserError(f"--dataset {path}:{line}: not CSV ({e})") from None
    return Rows(rows, places)


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file, rows = pyarrow.parquet.ParquetFile(path), []
        if file.metadata.num_rows > path.stat().st_size:  # a bit per row is more than a page's header takes
            raise UserError(
                f"--dataset {path}: says {file.metadata.num_rows:,} rows in {path.stat().st_size:,} bytes"
            )
        for batch in file.iter_batches(PARQUET_ROWS):
            if batch.nbytes > LINE * PARQUET_ROWS // 4:
                raise UserError(
                    f"--dataset {path}: {PARQUET_ROWS} rows of {batch.nbytes:,} bytes; at most {LINE:,} each"
                )
            rows += [without_fillers(row) for row in batch.to_pylist()]
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as e:  # ValueError: no UTF-8, or no such date
        raise UserError(
            f"--dataset {path}: not a parquet file ({(str(e) or type(e).__name__).splitlines()[0]})"
        ) from None
    return Rows(rows, [f"{path} row {i}" for i in range(1, len(rows) + 1)])


def without_fillers(row: dict) -> dict:
    """A row without the nulls within its columns, which a table's schema puts there: all objects of a column have the
    keys of all rows. Nulls in lists, and whole columns, are the data's own."""
    return {column: _filled_no_more(value) for column, value in row.items()}


def _filled_no_more(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled_no_more(part) for key, part in value.items() if part is not None}
    return [_filled_no_more(part) for part in value] if isinstance(value, list) else value


def _read_hub(recipe: Recipe, samples: int) -> Rows:
    """Through Hugging Face `datasets`: a hub id, or a local folder (one named like the id goes first)."""
    import datasets

    if not hasattr(datasets, "load_dataset"):  # our folder datasets/, seen as an empty package
        raise UserError(f"--dataset {recipe.source}: needs the package `datasets` (pip install datasets)")
    datasets.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what it raises says it as well
    online = not os.path.isdir(recipe.source) and not datasets.config.HF_HUB_OFFLINE
    if online and not _reachable(recipe.source):
        datasets.config.HF_HUB_OFFLINE = True  # its cache or nothing, without 20 seconds of retries
    try:
        loaded = datasets.load_dataset(
            recipe.source, data_files=recipe.data_files or None, split=recipe.split
        )
    except (*UNREADABLE, datasets.exceptions.DatasetsError) as e:
        if isinstance(e, datasets.exceptions.DatasetGenerationError):  # says nothing itself
            e = e.__cause__ or e
        reason = " ".join(str(e).split()) or type(e).__name__  # often many lines, the first saying little
        raise UserError(f"--dataset {recipe.source}: could not be loaded ({reason[:300]})") from None
    if 0 < samples < len(loaded):
        loaded = loaded.select(range(samples))
    return Rows(
        [without_fillers(row) for row in loaded.to_list()],
        [f"{recipe.source} row {i}" for i in range(1, len(loaded) + 1)],
    )


def _reachable(hub_id: str) -> bool:
    """Whether the hub answers, with whatever: what is wrong with the id is then for load_dataset to say."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(hub_id, repo_type="dataset", allow_patterns=[".gitattributes"])
    except LocalEntryNotFoundError:
        return False
    except (HfHubHTTPError, HFValidationError):
        pass
    return True
