"""Read the rows of a data set and render each as a text of one format.

Many rows with a chat template are rendered in several processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain

from fastcore.parallel import parallel

from data.chat import convert_template_errors
from data.chat_remarks import describe_hidden_parts, describe_missing_endings
from data.dataset_names import first_set, pin_commit
from data.formats import FORMATS, Format, RenderContext, Rendered, check_row
from data.recognition import describe_unread_columns, find_row_format, recognise_format
from data.row_files import Rows
from data.sources import Recipe, find_recipe, load_rows
from launch.ranks import count_cpus
from options.errors import UserError, join_names
from options.limits import MAX_ROW_CHARS

# A line that begins a turn in dialogues of one text: ### User:
HEADER = re.compile(r"^[ \t]*(###[ \t]*[A-Z][\w \t]{0,30}:)", re.MULTILINE)

MAX_FILLED_ROWS = 10**6  # rows that a recipe's `fill` is repeated for
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Examples:
    """A dataset as texts.

    Attributes:
        rendered: the rows as texts.
        format: the name of the format that they were rendered in.
        context: the context that they were rendered with.
        remarks: lines to print at start, on data that is not read or not shown.
        name: the set's name, with its commit if it is from the hub.
    """

    rendered: list[Rendered]
    format: str
    context: RenderContext
    remarks: tuple[str, ...] = ()
    name: str = ""


def read_examples(
    dataset: str,
    dataset_format: str,
    samples: int,
    context_length: int,
    tokenizer,
    day: str | None = None,
    preferred: str = "auto",
) -> Examples:
    """Read the rows of a set, and render each as a text of one format. Mixtures of sets: data/mixtures.py.

    Args:
        dataset: a recipe, file, folder or hub id.
        dataset_format: the format of all rows; "auto" = the recipe's, or the one that fits all of them.
        samples: number of rows to use; -1 = as the recipe says.
        context_length: number of tokens that a recipe's `fill` must fill.
        tokenizer: provides the chat template.
        day: as in RenderContext.
        preferred: a format to use instead of "auto" if it fits all rows.

    Raises UserError for anything wrong with the data.
    """
    recipe, file = find_recipe(dataset)
    samples = samples if samples > 0 else recipe.samples
    if recipe.fill:
        longest = MAX_ROW_CHARS // max(len(recipe.fill["output"]), 1)
        if context_length > longest or samples > MAX_FILLED_ROWS:
            raise UserError(
                f"--dataset {dataset}: fills at most {MAX_FILLED_ROWS:,} rows of {MAX_ROW_CHARS:,} characters"
            )
    data = load_rows(recipe, file, samples)
    rows = data.rows
    if recipe.fill:
        rows = [recipe.fill | {"output": recipe.fill["output"] * context_length}] * len(rows)
    name = _resolve_format(recipe, Rows(rows, data.origins), dataset, dataset_format, preferred)
    if name == "chat":
        _check_roles(rows, f"--dataset {dataset}")
    context = RenderContext(tokenizer, recipe.markers, day)
    if FORMATS[name].has_markers:
        _check_markers(rows, data.origins, recipe.markers)
    rendered = _render_all(_RowRenderer(rows, data.origins, name, context))
    remarks = [*data.remarks, *_describe_unread(recipe, rows, FORMATS[name])]
    if name == "chat":
        last_answers = [one.text[slice(*one.learned[-1])] for one in rendered if one.learned]
        remarks += describe_hidden_parts(context.chat, rows)
        remarks += describe_missing_endings(context.chat, last_answers)
    if FORMATS[name].has_markers:
        remarks += _describe_learned_headers(rendered)
    return Examples(rendered, name, context, tuple(remarks), pin_commit(dataset, data.commit))


def _resolve_format(
    recipe: Recipe, rows: Rows, dataset: str, dataset_format: str, preferred: str = "auto"
) -> str:
    """Return the name of the format that rows are rendered in. Raises UserError if none fits all of them.

    Arguments as in `read_examples`.
    """
    if dataset_format != "auto":
        return dataset_format
    choice = None if preferred == "auto" else preferred
    if recipe.format != "auto":
        formats = {find_row_format(row, recipe.markers, choice) for row in rows.rows} - {None}
        return choice if choice and formats == {choice} else recipe.format
    return recognise_format(rows.rows, rows.origins, f"--dataset {dataset}", recipe.markers, choice)


def _check_roles(rows: list[dict], error_prefix: str) -> None:
    """Raise UserError if messages have roles, but none is assistant: nothing could be learned."""
    conversations = (row.get("messages") for row in rows)
    messages = [m for c in conversations if isinstance(c, list) for m in c if isinstance(m, dict)]
    # `check_messages` reports messages without a role.
    roles = dict.fromkeys(m["role"] for m in messages if isinstance(m.get("role"), str))
    if roles and "assistant" not in roles:
        raise UserError(f"{error_prefix}: no message has the role assistant, only {join_names([*roles])}")


def _check_markers(rows: list[dict], origins: Sequence[str], markers: Sequence[str]) -> None:
    """Raise UserError for a dialogue whose questions begin with another header than the format's marker.

    The questions would be learned as parts of the answers.
    """
    question, answer = markers
    for row, origin in zip(rows, origins, strict=True):
        text = str(row.get("text"))
        if answer in text and question not in text and (header := HEADER.search(text.replace(answer, ""))):
            raise UserError(
                f"--dataset {origin}: has {header[1]!r} where the format has {question!r}; write a recipe"
                f" with markers = [{header[1]!r}, {answer!r}] (docs/data.md)"
            )


def _describe_learned_headers(rendered: Sequence[Rendered]) -> list[str]:
    """Return a remark on headers that are learned as parts of answers: they may be turns of a third role."""
    headers = [HEADER.findall("".join(row.text[slice(*span)] for span in row.learned)) for row in rendered]
    counts = Counter(header for found in headers for header in {*found})
    if not counts:
        return []
    names = join_names([f"{header} ({count:,})" for header, count in counts.most_common()])
    return [f"data: rows whose answers hold headers, which are learned as text of the answer: {names}"]


def _describe_unread(recipe: Recipe, rows: list[dict], form: Format) -> tuple[str, ...]:
    """Return remarks on columns that are not read, and on rows that are not learned for lack of a marker."""
    remarks = []
    unread = describe_unread_columns(rows, form, recipe.columns.values())
    if unread:
        remarks.append(f"data: columns that are not read: {unread}")
    marker = recipe.markers[1]
    unmarked = sum(marker not in str(row.get("text")) for row in rows) if form.has_markers else 0
    if unmarked:
        remarks.append(
            f"data: {unmarked:,} of {len(rows):,} rows have no marker {marker!r}; nothing of them is learned"
        )
    return tuple(remarks)


def find_format(dataset: str, dataset_format: str) -> tuple[str, list[str]]:
    """Return (the name of the format that `read_examples` renders in, the recipe's markers).

    The data is read only if neither the argument nor the recipe names the format. Raises UserError for
    anything wrong with it. dataset: a set or a mixture, whose sets have one format.
    """
    dataset = first_set(dataset)
    recipe, file = find_recipe(dataset)
    is_unknown = dataset_format == recipe.format == "auto"
    rows = load_rows(recipe, file, recipe.samples) if is_unknown else Rows([], [])
    return _resolve_format(recipe, rows, dataset, dataset_format), recipe.markers


@dataclass(frozen=True)
class _RowRenderer:
    """Renders rows in the format `name`. A call with a range of row indices returns their Rendered."""

    rows: list[dict]
    origins: list[str]
    name: str
    context: RenderContext

    def __call__(self, indices: range) -> list[Rendered]:
        rendered = []
        for i in indices:
            error_prefix = f"--dataset {self.origins[i]}"
            values = check_row(self.rows[i], FORMATS[self.name], error_prefix)
            with convert_template_errors(error_prefix):
                one = FORMATS[self.name].render(values, self.context)
            _check_surrogates(one.text, values, error_prefix)
            rendered.append(dataclasses.replace(one, row_number=i + 1))
            if len(one.text) > MAX_ROW_CHARS:
                raise UserError(
                    f"{error_prefix}: a text of {len(one.text):,} characters;"
                    f" at most {MAX_ROW_CHARS:,} are read"
                )
        return rendered


def _check_surrogates(text: str, values: dict, error_prefix: str) -> None:
    """Raise UserError if a text holds half a character, which JSON can spell and no tokenizer takes.

    values: the columns that the text was rendered from.
    """
    match = SURROGATE.search(text)
    if match:
        holds = (name for name, v in values.items() if SURROGATE.search(json.dumps(v, ensure_ascii=False)))
        where = f"column {column}" if (column := next(holds, "")) else "its text"
        raise UserError(f"{error_prefix}: {where} holds half a character (a surrogate), {match[0]!a}")


_worker_renderer: _RowRenderer  # set in the parent process before its workers are forked


def _render_all(render: _RowRenderer) -> list[Rendered]:
    """Render all rows; many chats in several processes, as a template takes a millisecond for some turns.

    The workers are forked, so that rows and tokenizer need no copying. They run only Python code.
    """
    total = len(render.rows)
    workers = min(count_cpus(), 16)
    if render.name != "chat" or total < 2000 or workers == 1 or not hasattr(os, "fork"):
        return render(range(total))
    global _worker_renderer
    _worker_renderer = render
    blocks = [range(i, min(i + 200, total)) for i in range(0, total, 200)]
    try:
        parts = parallel(_render_in_worker, blocks, n_workers=workers, method="fork", progress=False)
    except BrokenProcessPool:
        raise UserError(
            f"--dataset: one of {workers} processes that render its rows was killed; out of host memory is"
            " the usual cause"
        ) from None
    return list(chain.from_iterable(parts))


def _render_in_worker(indices: range) -> list[Rendered]:
    return _worker_renderer(indices)


def read_toy_texts() -> list[str]:
    """Return the rows of the embedded data set as texts, for the demo model's tokenizer."""
    rows = load_rows(*find_recipe("toy"), -1)
    return [FORMATS["alpaca"].render(row).text for row in rows.rows]
