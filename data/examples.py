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
from data.dataset_names import pin_commit
from data.formats import FORMATS, RenderContext, Rendered
from data.image_format import ImageFormat
from data.image_texts import check_placeholders
from data.reading import FormatRows, ReadingOptions, read_format_rows
from launch.ranks import count_cpus
from options.errors import UserError, join_names
from options.limits import MAX_ROW_CHARS

# A line that begins a turn in dialogues of one text: ### User:
HEADER = re.compile(r"^[ \t]*(###[ \t]*[A-Z][\w \t]{0,30}:)", re.MULTILINE)

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


def read_examples(dataset: str, options: ReadingOptions) -> Examples:
    """Read the rows of a set, and render each as a text of one format. Mixtures of sets: data/mixtures.py.

    In the returned context empty_thinking is "prompt" instead of "auto" if an answer has an empty thought
    before it. Raises UserError for anything wrong with the data. dataset: a recipe, file, folder or hub id.
    """
    data = read_format_rows(dataset, options)
    rows, name = data.rows, data.format
    if name == "chat" and options.needs_answer:
        _check_roles(rows, f"--dataset {dataset}")
    placeholder = options.image_format.placeholder if options.image_format else ""
    context = RenderContext(options.tokenizer, data.markers, options.day, options.empty_thinking, placeholder)
    if FORMATS[name].has_markers:
        _check_markers(rows, data.origins, data.markers)
    rendered = _render_all(_RowRenderer(rows, data.origins, name, context, options.needs_answer))
    rendered, remarks = _attach_images(rendered, data, options.image_format), [*data.remarks]
    if name == "chat":
        last_answers = [one.text[slice(*one.learned[-1])] for one in rendered if one.learned]
        remarks += describe_hidden_parts(context.chat, rows)
        remarks += describe_missing_endings(context.chat, last_answers)
    if FORMATS[name].has_markers:
        remarks += _describe_learned_headers(rendered)
    if empty := sum(one.has_empty_thought for one in rendered):
        context = dataclasses.replace(context, empty_thinking="prompt")
        remarks.append(
            f"data: {empty:,} of {len(rendered):,} rows have an empty thinking block before an answer. It is"
            " part of the prompt, and not learned (--empty_thinking)"
        )
    return Examples(rendered, name, context, tuple(remarks), pin_commit(dataset, data.commit))


def _attach_images(
    rendered: list[Rendered], data: FormatRows, image_format: ImageFormat | None
) -> list[Rendered]:
    """Return the texts with their images. Raises UserError for a text that means other images than these.

    data: the rows that were rendered. image_format: how the model takes images; None = it takes none.
    """
    if image_format is None:
        return rendered
    images = data.images or [()] * len(rendered)
    for one, shown, origin in zip(rendered, images, data.origins, strict=True):
        check_placeholders(one.text, len(shown), image_format, f"--dataset {origin}")
    pairs = zip(rendered, images, strict=True)
    return [dataclasses.replace(one, images=shown) if shown else one for one, shown in pairs]


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


@dataclass(frozen=True)
class _RowRenderer:
    """Renders rows in the format `name`, whose columns they have.

    A call with a range of row indices returns their Rendered.
    """

    rows: list[dict]
    origins: list[str]
    name: str
    context: RenderContext
    needs_answer: bool = True

    def __call__(self, indices: range) -> list[Rendered]:
        rendered = []
        for i in indices:
            error_prefix = f"--dataset {self.origins[i]}"
            values = FORMATS[self.name].check(self.rows[i], error_prefix)
            with convert_template_errors(error_prefix):
                one = FORMATS[self.name].render(values, self.context)
                if not self.needs_answer:
                    one = self._ask(one, values)
            _check_surrogates(one.text, values, error_prefix)
            rendered.append(dataclasses.replace(one, row_number=i + 1))
            if len(one.text) > MAX_ROW_CHARS:
                raise UserError(
                    f"{error_prefix}: a text of {len(one.text):,} characters;"
                    f" at most {MAX_ROW_CHARS:,} are read"
                )
        return rendered

    def _ask(self, rendered: Rendered, values: dict) -> Rendered:
        """Return a row that does not end with an answer as its prompt, of which nothing is learned.

        values: the columns that the row was rendered from. Other rows are returned as they are.
        """
        prompt = FORMATS[self.name].prompt(values, self.context)
        if rendered.learned and len(prompt) <= len(rendered.text):
            return rendered
        return dataclasses.replace(rendered, text=prompt, learned=[])


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
