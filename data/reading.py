"""Read the rows of a data set in the columns of one format, which is named or recognised from all rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.columns import NO_NAMES, ColumnNames
from data.dataset_names import first_set
from data.formats import FORMATS
from data.image_files import ImageFiles, ImageSource
from data.image_format import ImageFormat
from data.image_store import IMAGE_COLUMNS
from data.images import ImageRef
from data.reading_remarks import describe_choice, describe_two_systems, describe_unmarked
from data.recognition import (
    check_columns_are_read,
    find_candidate,
    list_candidates,
    list_unread_columns,
    recognise_format,
    select_schemas,
)
from data.row_files import Rows
from data.row_images import (
    LIST_COLUMNS,
    check_takes_images,
    check_unread_columns,
    describe_text_marks,
    explode_questions,
    has_parts,
    marks_are_images,
    show_all_images,
    take_image_columns,
)
from data.schemas import Schema, find_schema, has_content, join_columns, match_schemas
from data.sources import Recipe, find_recipe, load_rows
from options.config import Config
from options.errors import UserError
from options.limits import MAX_ROW_CHARS

MAX_FILLED_ROWS = 10**6  # rows that a recipe's `fill` is repeated for


@dataclass(frozen=True)
class FormatRows:
    """The rows of a data set, all of one format.

    Attributes:
        rows: in the columns that the format renders; texts are checked, messages are not.
        origins: the file and line, or the like, of each row, for messages.
        format: the name of the format.
        markers: texts that begin the turns of the two speakers in a guanaco text.
        remarks: lines to print at start.
        commit: of the hub set that they are from; "" = from elsewhere, or not known.
        images: of each row, in the order in which it shows them; [] = no row has one.
    """

    rows: list[dict]
    origins: list[str]
    format: str
    markers: Sequence[str]
    remarks: tuple[str, ...]
    commit: str = ""
    images: Sequence[Sequence[ImageRef]] = ()


@dataclass(frozen=True)
class ReadingOptions:
    """How the rows of a set are read and rendered.

    Attributes:
        tokenizer: encodes the texts, and provides the chat template.
        format: of all rows; "auto" = the recipe's, or the one that fits all of them.
        samples: number of rows to use; -1 = as the recipe says.
        context_length: number of tokens that rows are cut to, and that a recipe's `fill` must fill.
        columns: the data's names for columns, from options; those of a recipe count beside them.
        preferred: a format to use instead of "auto" if it fits all rows.
        day, empty_thinking: as in RenderContext.
        needs_answer: whether every row must have an answer. If not, rows without one are prompts in the
            format `preferred`.
        image_format: how the model takes images; None = it takes none.
        image_folder: the folder that paths of images are relative to; None = that of the data file.
        texts_alone: whether columns of images that are not read are left out; if not, they are an error.
    """

    tokenizer: Any
    format: str = "auto"
    samples: int = -1
    context_length: int = 512
    columns: ColumnNames = NO_NAMES
    preferred: str = "auto"
    day: str | None = None
    empty_thinking: str = "auto"
    needs_answer: bool = True
    image_format: ImageFormat | None = None
    image_folder: str | None = None
    texts_alone: bool = False

    @classmethod
    def from_config(
        cls, config: Config, tokenizer, image_format: ImageFormat | None = None
    ) -> ReadingOptions:
        """Return how a run reads --dataset."""
        return cls(
            tokenizer,
            config.dataset_format,
            config.dataset_samples,
            config.context_length,
            columns=ColumnNames.from_options(config.columns, config.text_column),
            day=config.chat_date,
            empty_thinking=config.empty_thinking,
            image_format=image_format,
            image_folder=config.image_folder,
            texts_alone=config.images == "false",
        )

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))


def read_format_rows(dataset: str, options: ReadingOptions) -> FormatRows:
    """Read the rows of a set in the columns of one format. Raises UserError for anything wrong with them.

    dataset: a recipe, file, folder or hub id.
    """
    recipe, file = find_recipe(dataset)
    samples = options.samples if options.samples > 0 else recipe.samples
    if recipe.fill:
        longest = MAX_ROW_CHARS // max(len(recipe.fill["output"]), 1)
        if options.context_length > longest or samples > MAX_FILLED_ROWS:
            raise UserError(
                f"--dataset {dataset}: fills at most {MAX_FILLED_ROWS:,} rows of {MAX_ROW_CHARS:,} characters"
            )
    data, given, renamed = _load_split(recipe, file, samples, options, f"--dataset {dataset}")
    if recipe.fill:
        filled = recipe.fill | {"output": recipe.fill["output"] * options.context_length}
        data = dataclasses.replace(data, rows=[filled] * len(data.rows))
    has_images = bool(given) or (options.image_format is not None and has_parts(data.rows))
    named = _columns_of_formats(renamed.named_by)
    matched = _match_prompts(data.rows, named, options)
    if matched:
        name = options.preferred
    else:
        name, schemas = _resolve_format(recipe, data, dataset, named, options, has_images)
        matched = match_schemas(data.rows, schemas)
    unread = list_unread_columns(data.rows, matched, renamed.names.values())
    if not (has_images or options.texts_alone):
        check_unread_columns(data.rows, unread, options.image_format is not None, f"--dataset {dataset}")
    remarks = [
        *data.remarks,
        *([f"data: columns that are not read: {join_columns(unread)}"] if unread else []),
        *(describe_unmarked(data.rows, recipe.markers[1]) if FORMATS[name].has_markers else ()),
    ]
    if options.format == recipe.format == options.preferred == "auto":
        remarks += describe_choice(name, matched[0], options.has_template, has_images)
    read, names = zip(data.rows, matched, data.origins, strict=True), renamed.describe()
    rows = [
        schema.read(row, f"--dataset {origin}", options.needs_answer, names) for row, schema, origin in read
    ]
    files = ImageFiles(options.image_folder)
    has_marks = options.image_format is not None and marks_are_images(data.rows, given)
    shown = (has_marks, FORMATS[name], files, options.image_format)
    rows, images = show_all_images(rows, data, given, *shown)
    remarks += describe_text_marks(rows) if options.image_format and not has_marks else []
    remarks += describe_two_systems(data.rows, rows)
    return FormatRows(rows, data.origins, name, recipe.markers, tuple(remarks), data.commit, images)


def _load_split(
    recipe: Recipe, file: Path | None, samples: int, options: ReadingOptions, error_prefix: str
) -> tuple[Rows, list[list[ImageSource]], ColumnNames]:
    """Return (rows without their columns of images, the images of each or [], names of renamed columns).

    Arguments as for `_load_renamed`. Raises UserError as that does, and for images if the model takes none.
    """
    data, renamed = _load_renamed(recipe, file, samples, options.columns, error_prefix)
    takes_images = options.image_format is not None
    data = explode_questions(data)
    if samples > 0:  # of a row, several questions may have become rows
        data = data.first(samples)
    data, given = take_image_columns(data, takes_images, renamed.names)
    if not takes_images:
        check_takes_images(data, given)
    return data, given, renamed


def _columns_of_formats(named: Mapping[str, str]) -> dict[str, str]:
    """Return {a column that formats read: what named it}, of columns that may also be of images or of lists.

    Of a list of questions each is one in the end.
    """
    return {
        LIST_COLUMNS.get(column, column): by for column, by in named.items() if column not in IMAGE_COLUMNS
    }


def _match_prompts(
    rows: Sequence[Mapping], named: Iterable[str], options: ReadingOptions
) -> list[Schema] | None:
    """Return the schemas of rows of which some are prompts without an answer, all in the format `preferred`.

    None if all rows have answers, or must have them, or do not fit the format. named: columns of the format
    that the schemas must read.
    """
    if options.needs_answer or options.preferred == "auto":
        return None
    schemas = [schema for schema in FORMATS[options.preferred].schemas if {*schema.columns} >= {*named}]
    found = [find_schema(row, schemas, needs_answer=False) for row in rows]
    matched = [schema for schema in found if schema]
    columns = (schema.answer_column for schema in matched)
    lacks_answer = any(c and not has_content(row.get(c)) for c, row in zip(columns, rows, strict=False))
    return matched if len(matched) == len(rows) and lacks_answer else None


def _load_renamed(
    recipe: Recipe, file: Path | None, samples: int, columns: ColumnNames, error_prefix: str
) -> tuple[Rows, ColumnNames]:
    """Return (rows with their columns renamed, the names of the renamed columns).

    Names that must exist replace those that the recipe has for the same columns. Names that need not exist
    are used only for columns that the recipe does not name.

    Args:
        recipe, file, samples: as for `load_rows`.
        columns: as in ReadingOptions.
        error_prefix: begins errors in `columns`.

    Raises UserError as `load_rows` does, and for a column that the data lacks.
    """
    of_recipe = ColumnNames.from_recipe(recipe.columns)
    if columns.must_exist:
        of_recipe = of_recipe.without(columns.names)
    else:
        columns = columns.without(of_recipe.names)
    image_columns = [columns.over(of_recipe).names.get(name, name) for name in IMAGE_COLUMNS]
    data = load_rows(dataclasses.replace(recipe, columns={}), file, samples, image_columns)
    found = columns.find_in(data.rows, error_prefix).over(of_recipe.find_in(data.rows, error_prefix))
    rows, renamed = found.rename(data.rows, error_prefix)  # all at once: each name is one of the data's own
    return dataclasses.replace(data, rows=rows), renamed


def _resolve_format(
    recipe: Recipe,
    rows: Rows,
    dataset: str,
    named: Mapping[str, str],
    options: ReadingOptions,
    has_images: bool,
) -> tuple[str, Sequence[Schema]]:
    """Return (the name of the format that rows are rendered in, the schemas that they may have).

    Args:
        recipe, rows: the recipe and its rows.
        dataset: its name, for errors.
        named: {a column of a format: what named it}, which the schemas must read.
        options: how the rows are read.
        has_images: whether rows have images.

    Raises UserError if no format fits all rows, or reads the named columns.
    """
    if options.format != "auto":
        return options.format, select_schemas(options.format, named, f"--dataset {dataset}")
    choice = None if options.preferred == "auto" else options.preferred
    candidates = list_candidates(options.has_template, choice, named, has_images)
    if recipe.format != "auto":
        found = {find_candidate(row, recipe.markers, candidates) for row in rows.rows} - {None}
        takes_choice = choice and {candidate[0] for candidate in found if candidate} == {choice}
        name = choice if choice and takes_choice else recipe.format
        return name, select_schemas(name, named, f"--dataset {dataset}")
    schemas = [schema for _, schema in list_candidates(options.has_template, choice, (), has_images)]
    check_columns_are_read(named, schemas, f"--dataset {dataset}")
    name, schema = recognise_format(
        rows.rows, rows.origins, f"--dataset {dataset}", recipe.markers, candidates
    )
    return name, [schema]


def find_format(dataset: str, options: ReadingOptions) -> tuple[str, Recipe]:
    """Return (the name of the format that `read_examples` renders in, the recipe of the data).

    The data is read only if neither the options nor the recipe name the format. Raises UserError for anything
    wrong with it. dataset: a set or a mixture, whose sets have one format.
    """
    dataset = first_set(dataset)
    recipe, file = find_recipe(dataset)
    if options.format != "auto" or recipe.format != "auto":
        return options.format if options.format != "auto" else recipe.format, recipe
    data, given, renamed = _load_split(recipe, file, recipe.samples, options, f"--dataset {dataset}")
    has_images = bool(given) or has_parts(data.rows)
    return _resolve_format(recipe, data, dataset, _columns_of_formats(renamed.named_by), options, has_images)[
        0
    ], recipe
