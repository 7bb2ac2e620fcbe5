"""A data set as texts: `read_examples` reads its rows and renders each in a format.

Many rows with a chat template are rendered in several processes.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain

from fastcore.parallel import parallel

from data.chat import template_errors
from data.formats import FORMATS, Format, RenderContext, Rendered, checked
from data.recognition import format_of, recognise, unread_columns
from data.row_files import Rows
from data.sources import Recipe, find_recipe, load_rows
from data.unshown import unclosed, unshown
from options.errors import UserError, join_names
from options.limits import MAX_ROW_CHARS

FILLED = 10**6  # rows that a recipe makes of its `fill`


@dataclass(frozen=True)
class Examples:
    """A dataset as texts. format, context: what its rows were rendered with; remarks: lines to tell at start,
    of what was not read or not shown."""

    rendered: list[Rendered]
    format: str
    context: RenderContext
    remarks: tuple[str, ...] = ()


def read_examples(
    dataset: str,
    dataset_format: str,
    samples: int,
    context_length: int,
    tokenizer,
    day: str | None = None,
    preferred: str = "auto",
) -> Examples:
    """--dataset, read and rendered.

    Args:
        dataset_format: of all rows; auto = the recipe's, or the one that all of them fit.
        samples: rows used; -1 = as the recipe says.
        day: as in RenderContext.
        preferred: the format instead of auto, if all rows fit it.

    Raises UserError for anything wrong with the data.
    """
    recipe, file = find_recipe(dataset)
    samples = samples if samples > 0 else recipe.samples
    if recipe.fill and (
        context_length > MAX_ROW_CHARS // max(len(recipe.fill["output"]), 1) or samples > FILLED
    ):
        raise UserError(f"--dataset {dataset}: fills at most {FILLED:,} rows of {MAX_ROW_CHARS:,} characters")
    data = load_rows(recipe, file, samples)
    rows = data.rows
    if recipe.fill:
        rows = [recipe.fill | {"output": recipe.fill["output"] * context_length}] * len(rows)
    name = _format_of(recipe, Rows(rows, data.origins), dataset, dataset_format, preferred)
    if name == "chat":
        _check_roles(rows, f"--dataset {dataset}")
    context = RenderContext(tokenizer, recipe.markers, day)
    rendered = _render_all(_Rendering(rows, data.origins, name, context))
    remarks = (*data.remarks, *_remarks(recipe, rows, FORMATS[name]))
    if name == "chat":
        last = [one.text[slice(*one.learned[-1])] for one in rendered if one.learned]
        remarks = (*remarks, *unshown(context.chat, rows), *unclosed(context.chat, last))
    return Examples(rendered, name, context, remarks)


def _format_of(recipe: Recipe, rows: Rows, dataset: str, asked: str, preferred: str = "auto") -> str:
    """As `read_examples`, whose dataset_format is `asked`."""
    if asked != "auto":
        return asked
    first = None if preferred == "auto" else preferred
    if recipe.format != "auto":
        found = {format_of(row, recipe.markers, first) for row in rows.rows} - {None}
        return first if first and found == {first} else recipe.format
    return recognise(rows.rows, rows.origins, f"--dataset {dataset}", recipe.markers, first)


def _check_roles(rows: list[dict], where: str) -> None:
    """Raises UserError where no message is the assistant's, so that nothing could be learned."""
    found = (row.get("messages") for row in rows)
    messages = [m for given in found if isinstance(given, list) for m in given if isinstance(m, dict)]
    roles = dict.fromkeys(str(message.get("role")) for message in messages)
    if roles and "assistant" not in roles:
        raise UserError(f"{where}: no message has the role assistant, only {join_names([*roles])}")


def _remarks(recipe: Recipe, rows: list[dict], form: Format) -> tuple[str, ...]:
    """Lines on what of the rows is not read, or not learned."""
    remarks = []
    unread = unread_columns(rows, form, recipe.columns.values())
    if unread:
        remarks.append(f"data: columns that are not read: {unread}")
    marker = recipe.markers[1]
    unmarked = sum(marker not in str(row.get("text")) for row in rows) if form.marked else 0
    if unmarked:
        remarks.append(
            f"data: {unmarked:,} of {len(rows):,} rows have no marker {marker!r}; nothing of them is learned"
        )
    return tuple(remarks)


def find_format(dataset: str, dataset_format: str) -> tuple[str, list[str]]:
    """(the name of the format that `read_examples` renders in, the recipe's markers). Reads the data only
    where nothing else tells. Raises UserError for what is wrong with it."""
    recipe, file = find_recipe(dataset)
    unknown = dataset_format == recipe.format == "auto"
    rows = load_rows(recipe, file, recipe.samples) if unknown else Rows([], [])
    return _format_of(recipe, rows, dataset, dataset_format), recipe.markers


@dataclass(frozen=True)
class _Rendering:
    """Rows to be rendered in the format `name`; called with a range of them, it returns their Rendered."""

    rows: list[dict]
    origins: list[str]
    name: str
    context: RenderContext

    def __call__(self, numbers: range) -> list[Rendered]:
        rendered = []
        for i in numbers:
            where = f"--dataset {self.origins[i]}"
            values = checked(self.rows[i], FORMATS[self.name], where)
            with template_errors(where):
                one = FORMATS[self.name].render(values, self.context)
                one.text.encode()  # JSON can spell half a character, which no tokenizer takes
            rendered.append(dataclasses.replace(one, number=i + 1))
            if len(one.text) > MAX_ROW_CHARS:
                raise UserError(
                    f"{where}: a text of {len(one.text):,} characters; at most {MAX_ROW_CHARS:,} are read"
                )
        return rendered


_held: _Rendering  # of a process that renders: set before its workers are forked


def _render_all(render: _Rendering) -> list[Rendered]:
    """In this process, unless there is much to do: a chat template takes a millisecond for some turns.

    The workers are forked, so that rows and tokenizer need no copying; they run nothing but Python.
    """
    total = len(render.rows)
    workers = min(os.cpu_count() or 1, 16)
    if render.name != "chat" or total < 2000 or workers == 1 or not hasattr(os, "fork"):
        return render(range(total))
    global _held
    _held = render  # the forked workers find it here
    blocks = [range(i, min(i + 200, total)) for i in range(0, total, 200)]
    try:
        parts = parallel(_render_held, blocks, n_workers=workers, method="fork", progress=False)
    except BrokenProcessPool:
        raise UserError(
            f"--dataset: one of {workers} processes that render its rows was killed; out of host memory is the"
            " usual cause"
        ) from None
    return list(chain.from_iterable(parts))


def _render_held(numbers: range) -> list[Rendered]:
    return _held(numbers)


def toy_texts() -> list[str]:
    """The embedded data as texts, for the demo model's tokenizer."""
    rows = load_rows(*find_recipe("toy"), -1)
    return [FORMATS["alpaca"].render(row).text for row in rows.rows]
