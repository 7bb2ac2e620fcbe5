"""The images of a data set's rows: taken out of their columns, and put where a row shows them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from data.formats import Format
from data.image_files import ImageFiles, ImageSource
from data.image_format import ImageFormat
from data.image_parts import MARK, has_image_parts, list_sources, place_images
from data.image_store import DATA_URL, IMAGE_COLUMNS, StoredImage, UnreadImage, holds_image
from data.images import ImageRef
from data.row_files import Rows
from data.schemas import has_content, join_columns
from options.data_files import IMAGE_SUFFIXES
from options.errors import UserError

# Columns of lists of messages, whose contents may have parts.
MESSAGE_COLUMNS = ("messages", "conversations", "prompt", "completion")
# Columns of lists, and the column that each of their elements becomes.
LIST_COLUMNS = {"questions": "question", "answers": "answer"}
NO_VISION = "has an image, but the model takes texts only"


def explode_questions(data: Rows) -> Rows:
    """Return the rows; of one with an image and lists `questions` and `answers`, each question is a row.

    Its other columns, such as the image, are in each of these rows. Rows that have a question, an answer or
    messages beside such lists stay as they are, and so do rows of texts alone. Rows whose lists are empty are
    left out, and counted in a remark. Raises UserError for lists of different lengths, and if no row is left.
    """
    if not any(_is_grouped(row) for row in data.rows):
        return data
    rows, origins, folders, n_empty = list[dict](), list[str](), list[str](), 0
    for row, origin, folder in zip(data.rows, data.origins, data.folders, strict=True):
        if not _is_grouped(row):
            exploded, names = [row], [origin]
        else:
            exploded = _explode(row, f"--dataset {origin}")
            names = [f"{origin} question {i}" for i in range(1, len(exploded) + 1)]
        n_empty += not exploded
        rows += exploded
        origins += names
        folders += [folder] * len(exploded)
    if not rows:
        raise UserError(f"--dataset {data.origins[0]}: this row and all others have no questions")
    remarks = data.remarks
    if n_empty:
        remarks += (f"data: {n_empty:,} of {len(data.rows):,} rows have no questions, and are dropped",)
    return replace(data, rows=rows, origins=origins, folders=folders, remarks=remarks)


def _is_grouped(row: Mapping) -> bool:
    """Return whether a row has a column of images, and lists of questions and answers but no single one."""
    return (
        isinstance(row.get("questions"), list)
        and isinstance(row.get("answers"), list)
        and any(name in row for name in IMAGE_COLUMNS)
        and not any(row.get(name) is not None for name in ("question", "answer", "messages"))
    )


def _explode(row: Mapping, error_prefix: str) -> list[dict]:
    questions, answers = row["questions"], row["answers"]
    if len(questions) != len(answers):
        raise UserError(
            f"{error_prefix}: has {len(questions)} questions and {len(answers)} answers; each question needs"
            " its answer"
        )
    others = {name: value for name, value in row.items() if name not in ("questions", "answers")}
    return [others | {"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]


def take_image_columns(
    data: Rows, takes_images: bool, named: Collection[str]
) -> tuple[Rows, list[list[ImageSource]]]:
    """Return (the rows without the columns of images, the images of each row; [] if no row has one).

    Without images the rows stay as they are.

    Args:
        data: the rows.
        takes_images: whether the model does. If not, a column counts only if it is named, or holds what looks
            like an image: data of texts may have a column of that name, too.
        named: columns that the user named.

    Raises UserError for a column that holds anything but images, and for images in both columns.
    """
    names = [name for name in IMAGE_COLUMNS if takes_images or name in named]
    if not takes_images:
        names += [
            name
            for name in IMAGE_COLUMNS
            if any(name in row and _looks_like_image(row[name]) for row in data.rows)
        ]
    if not names:
        return data, []
    given = []
    for row, origin in zip(data.rows, data.origins, strict=True):
        found = [list_sources(row.get(name), f"--dataset {origin}") for name in dict.fromkeys(names)]
        if len([*filter(None, found)]) > 1:
            raise UserError(f"--dataset {origin}: both columns images and image hold images; leave one out")
        given.append([source for sources in found for source in sources])
    if not any(given):
        return data, []
    rows = [{name: value for name, value in row.items() if name not in names} for row in data.rows]
    return replace(data, rows=rows), given


def _looks_like_image(value: Any) -> bool:
    """Return whether a cell is an image, or names one."""
    if isinstance(value, list):
        return any(_looks_like_image(each) for each in value)
    if isinstance(value, Mapping):
        return any(_looks_like_image(value.get(key)) for key in ("path", "bytes"))
    if isinstance(value, bytes):
        return holds_image(value)
    is_path = isinstance(value, str) and (
        value.lower().endswith(IMAGE_SUFFIXES) or value.startswith(DATA_URL)
    )
    return is_path or isinstance(value, StoredImage | UnreadImage)


def marks_are_images(rows: Sequence[Mapping], given: Sequence[list[ImageSource]]) -> bool:
    """Return whether MARK in the texts of a data set stands for an image: the set has images, or a column.

    given: the images of the columns; [] = no row has one.
    """
    return bool(given) or any(name in row for row in rows for name in IMAGE_COLUMNS) or has_parts(rows)


def describe_text_marks(rows: Sequence[Mapping]) -> list[str]:
    """Return a list with one remark on rows of texts alone that hold MARK, or an empty list."""
    count = sum(any(MARK in text for text in _list_texts(row)) for row in rows)
    if not count:
        return []
    return [
        f"data: {count:,} of {len(rows):,} rows hold {MARK}, which is a text here: the set has neither images"
        " nor a column for them"
    ]


def check_takes_images(data: Rows, given: Sequence[list[ImageSource]]) -> None:
    """Raise UserError if a row has an image, for a model that takes none. given: images of the columns."""
    for i, (row, origin) in enumerate(zip(data.rows, data.origins, strict=True)):
        if (given and given[i]) or _has_parts(row):
            raise UserError(
                f"--dataset {origin}: {NO_VISION}; leave the column or part out, or name a model with images"
                " by --model_name"
            )


def check_unread_columns(
    rows: Sequence[Mapping], unread: Iterable[str], takes_images: bool, error_prefix: str
) -> None:
    """Raise UserError for a column that is not read though all that it holds looks like images.

    Args:
        rows: of a data set that shows no image.
        unread: its columns that are not read.
        takes_images: whether the model does.
        error_prefix: begins the error.
    """
    for name in unread:
        values = [row[name] for row in rows if has_content(row.get(name))]
        if values and all(map(_looks_like_image, values)):
            column, remedy = join_columns([name]), "name a model with images by --model_name"
            if takes_images:
                remedy = f"--columns image={column}, or a recipe's `columns`, reads them"
            raise UserError(
                f"{error_prefix}: its column {column} holds images, and is not read; {remedy}; --images false"
                " trains on the texts alone (docs/data.md)"
            )


def has_parts(rows: Sequence[Mapping]) -> bool:
    """Return whether a message of any row has a part of an image."""
    return any(map(_has_parts, rows))


def _has_parts(row: Mapping) -> bool:
    """Return whether a message of a row has a part of an image."""
    return any(name in row and has_image_parts(row[name]) for name in MESSAGE_COLUMNS)


def check_reserved(values: Any, reserved: Sequence[str], error_prefix: str) -> None:
    """Raise UserError if a text, at any depth of a row, holds a text that means a token of images."""
    for text in _list_texts(values):
        for token in reserved:
            if token in text:
                raise UserError(
                    f"{error_prefix}: its text holds {token}, which stands for an image; leave it out, and"
                    " give images as parts or in a column images (docs/data.md)"
                )


def _list_texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value, however deep they are, and the names in its objects."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping | list):
            left += [*part, *part.values()] if isinstance(part, Mapping) else part


def show_all_images(
    rows: list[dict],
    data: Rows,
    given: Sequence[list[ImageSource]],
    has_marks: bool,
    form: Format,
    files: ImageFiles,
    image_format: ImageFormat | None,
) -> tuple[list[dict], list[list[ImageRef]]]:
    """Return (the rows, which show their images; the images of each, or [] if no row has one).

    Args:
        rows: in the columns of the format.
        data: their origins and folders.
        given: the images of their columns; [] = there are none.
        has_marks: from `marks_are_images`.
        form: the format.
        files: finds the images.
        image_format: how the model takes images; None = it takes none.

    Raises UserError for an image that cannot be used or shown, and for texts that mean tokens of images.
    """
    placeholder, reserved = "", list[str]()
    if image_format is not None:
        placeholder = image_format.placeholder
        reserved = [
            text for text in (placeholder, *image_format.reserved) if not (has_marks and text == MARK)
        ]
    shown, images = list[dict](), list[list[ImageRef]]()
    for i, (values, origin, folder) in enumerate(zip(rows, data.origins, data.folders, strict=True)):
        check_reserved(values, reserved, f"--dataset {origin}")
        of_row = given[i] if given else []
        row, sources = show_images(values, of_row, has_marks, form, placeholder, f"--dataset {origin}")
        shown.append(row)
        refs = [files.find(source, folder, origin) for source in sources]
        if len(refs) > 1:
            refs = [_number_unnamed(ref, i) for i, ref in enumerate(refs, 1)]
        images.append(refs)
        reasons = (image_format.refuse(ref.width, ref.height) for ref in refs) if image_format else ()
        if reason := next(filter(None, reasons), ""):
            raise UserError(f"--dataset {origin}: has an image of {reason}")
    return shown, images if any(images) else []


def _number_unnamed(ref: ImageRef, number: int) -> ImageRef:
    """Return an image of a row that has several; bytes without a name are called by their number."""
    if ref.size is None or ref.name:
        return ref
    return replace(ref, name=f"image {number} of {os.path.basename(ref.origin)}")


def show_images(
    values: dict,
    given: Sequence[ImageSource],
    has_marks: bool,
    form: Format,
    placeholder: str,
    error_prefix: str,
) -> tuple[dict, list[ImageSource]]:
    """Return (a row that shows its images, these in their order).

    In a conversation they are parts of the messages. Any other text has a placeholder for each: in the place
    of MARK, or before the question.

    Args:
        values: the row in the columns that the format renders.
        given: the images of its columns.
        has_marks: whether MARK in its texts, except in answers, stands for an image.
        form: the format.
        placeholder: the text that stands for an image.
        error_prefix: begins each error.

    Raises UserError as `place_images` does, and for a format that cannot show images.
    """
    if "messages" in form.schemas[0].required:
        messages, sources = place_images(values["messages"], given, has_marks, error_prefix)
        return values | {"messages": messages}, sources
    asked = [name for name in values if name != form.schemas[0].answer_column] if has_marks else []
    count = sum(values[name].count(MARK) for name in asked)
    if count > len(given):
        raise UserError(
            f"{error_prefix}: has more images in the text than in the column: {count} {MARK}, and"
            f" {len(given)} in its column images or image; add it, or leave the mark out"
        )
    if not given:
        return values, []
    if form.has_markers:
        raise UserError(
            f"{error_prefix}: has an image, which a text of a whole dialogue cannot show; write the turns as"
            " messages (docs/data.md)"
        )
    if count not in (0, len(given)):
        raise UserError(
            f"{error_prefix}: has {len(given)} images in its column images or image, but its text has places"
            f" for {count}"
        )
    if count:
        return values | {name: values[name].replace(MARK, placeholder) for name in asked}, list(given)
    return values | {form.prompt_column: placeholder * len(given) + values[form.prompt_column]}, list(given)
