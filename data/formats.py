"""Render a row of a dataset as one text, and say which parts of that text are learned.

A format is a function from a row to a Rendered. FORMATS lists the formats with the columns in which their
rows may come (data/schemas.py). By these data/recognition.py recognises the format of a user's own file. Each
format also has the function that writes the same text up to the answer, which is the prompt of a trained
model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from data.chat import ChatTemplate
from data.images import ImageRef
from data.messages import check_messages, check_tools
from data.schemas import (
    ALPACA_COLUMNS,
    CHAT_SCHEMAS,
    COMPLETION_SCHEMAS,
    QA_SCHEMAS,
    TEXT_COLUMN,
    Auto,
    Schema,
    find_schema,
)

# Alpaca's prompts as alpaca-lora, axolotl and most later programs write them: the answer begins on a new
# line.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the"
    " request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n### Response:\n"
)
# Alpaca's prompts as Stanford's train.py and fsdp_qlora write them. The answer follows the colon.
STANFORD, STANFORD_INPUT = ALPACA.removesuffix("\n"), ALPACA_INPUT.removesuffix("\n")
ALPACA_HEADER = "### Instruction:"
GUANACO_MARKERS = ("### Human:", "### Assistant:")
QA = "### Question:\n{question}\n\n### Answer:\n"
QA_CONTEXT = "### Context:\n{context}\n\n### Question:\n{question}\n\n### Answer:\n"


@dataclass(frozen=True)
class Rendered:
    """A row as one text.

    Attributes:
        text: the text of the row.
        learned: [start, end) character ranges whose tokens are targets.
        needs_eos: whether the last range reaches the end of the text and an EOS token follows.
        add_special_tokens: whether the tokenizer adds its own BOS and the like.
        row_number: the number of the row in its dataset, from 1.
        marker: a text that ends an answer where no token does.
        last_answer_index: index of the learned range that the last answer begins with.
        has_empty_thought: whether an empty thought is before a learned range, and not learned.
        set_name: the name of its dataset, where rows of several ones are joined; else "".
        images: for which a placeholder stands in the text, in their order.
        image_spans: the ranges of characters that have replaced the placeholders (`expand_images`).
    """

    text: str
    learned: list[tuple[int, int]]
    needs_eos: bool = True
    add_special_tokens: bool = True
    row_number: int = 0
    marker: str | None = None
    last_answer_index: int = -1
    has_empty_thought: bool = False
    set_name: str = ""
    images: Sequence[ImageRef] = ()
    image_spans: Sequence[tuple[int, int]] = ()

    @property
    def last_answer_range(self) -> tuple[int, int]:
        """The range of the last answer, from its first learned range to its last one.

        The template may write text between them.
        """
        return self.learned[max(self.last_answer_index, -len(self.learned))][0], self.learned[-1][1]


@dataclass(frozen=True)
class RenderContext:
    """What all rows of a dataset are rendered with.

    Attributes:
        tokenizer: provides the chat template of the `chat` format; other formats need none.
        markers: texts that begin the turns of the two speakers in a guanaco text.
        day: YYYY-MM-DD, the date for chat templates that write today's; None = today.
        empty_thinking, placeholder: as for ChatTemplate.
    """

    tokenizer: Any = None
    markers: Sequence[str] = GUANACO_MARKERS
    day: str | None = None
    empty_thinking: str = "auto"
    placeholder: str = ""

    @cached_property
    def chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.day, self.empty_thinking, self.placeholder)


@dataclass(frozen=True)
class Format:
    """A way to render rows.

    Attributes:
        render: render(row, context) returns a Rendered.
        prompt: prompt(row, context) returns the text up to the last answer, which the row may lack.
        schemas: the columns in which its rows may come; first those that it renders.
        learned: what is learned of a row, in the words of docs/data.md.
        check: check(row, error_prefix) returns the row as it is rendered. Raises UserError.
        is_conversation: whether more turns can follow an answer.
        make_question: make_question(text, markers) returns the value of `prompt_column` for a bare question.
        add_special_tokens: as in Rendered.
        has_markers: whether its text has the markers of two speakers.
        marker: marker(context) returns the text that ends an answer where no token does, or None.
        question_header: question_header(context) returns the text that begins a question; "" if none does.
    """

    render: Callable[..., Rendered]
    prompt: Callable[..., str]
    schemas: tuple[Schema, ...]
    learned: str
    check: Callable[[Mapping, str], dict] = lambda row, _error_prefix: dict(row)
    is_conversation: bool = False
    make_question: Callable[..., str | list] = lambda text, _markers: text
    add_special_tokens: bool = True
    has_markers: bool = False
    marker: Callable[[RenderContext], str | None] = lambda context: None
    question_header: Callable[[RenderContext], str] = lambda context: ""

    @property
    def prompt_column(self) -> str:
        """The column that holds a bare question."""
        return self.schemas[0].required[0]

    def make_prompt_row(self, text: str, markers: Sequence[str]) -> dict:
        """Return the row of a bare question, without an answer."""
        return {self.prompt_column: self.make_question(text, markers)}


def _render_answer(prompt: str, response: str) -> Rendered:
    """Render a prompt and its learned answer. An empty answer teaches nothing, so its row is dropped."""
    if not response.strip():
        return Rendered(prompt, [], needs_eos=False)
    text = prompt + response
    return Rendered(text, [(len(prompt), len(text))])


def _write_alpaca_prompt(row: Mapping[str, str], _context: RenderContext | None = None) -> str:
    return (ALPACA_INPUT if row.get("input", "").strip() else ALPACA).format_map(row)


def _render_alpaca(row: Mapping[str, str], _context: RenderContext | None = None) -> Rendered:
    return _render_answer(_write_alpaca_prompt(row), row["output"])


def _write_stanford_prompt(row: Mapping[str, str], _context: RenderContext | None = None) -> str:
    return (STANFORD_INPUT if row.get("input", "") else STANFORD).format_map(row)  # spaces count as an input


def _render_stanford(row: Mapping[str, str], _context: RenderContext | None = None) -> Rendered:
    return _render_answer(_write_stanford_prompt(row), row["output"])


def _write_qa_prompt(row: Mapping[str, str], _context: RenderContext | None = None) -> str:
    return (QA_CONTEXT if row.get("context", "").strip() else QA).format_map(row)


def _render_qa(row: Mapping[str, str], _context: RenderContext | None = None) -> Rendered:
    return _render_answer(_write_qa_prompt(row), row["answer"])


def _write_plain_prompt(row: Mapping[str, str], _context: RenderContext | None = None) -> str:
    return row["prompt"]


def _render_prompt_completion(row: Mapping[str, str], _context: RenderContext | None = None) -> Rendered:
    return _render_answer(row["prompt"], row["completion"])


def _render_completion(row: Mapping[str, str], _context: RenderContext | None = None) -> Rendered:
    text = row["text"]
    return Rendered(text, [(0, len(text))] if text.strip() else [])


def _write_completion_prompt(row: Mapping[str, str], _context: RenderContext | None = None) -> str:
    return row["text"]


def _render_guanaco(row: Mapping[str, str], context: RenderContext) -> Rendered:
    """Render a dialogue in one text. Markers may be anywhere: OpenAssistant's turns have no line breaks."""
    text = row["text"].rstrip()
    markers = context.markers
    turns = _find_markers(text, markers)
    learned, ends_with_answer = [], False
    ends = [turn.start() for turn in turns[1:]] + [len(text)]
    for turn, end in zip(turns, ends, strict=False):  # without a marker there is nothing to learn
        start = turn.end()
        answer = text[start:end].rstrip()  # the line break before a marker is not learned
        ends_with_answer = turn[1] == markers[1] and bool(answer)
        if ends_with_answer:
            learned.append((start, start + len(answer)))
    return Rendered(text, learned, needs_eos=ends_with_answer, marker=markers[0])


def _find_markers(text: str, markers: Sequence[str]) -> list[re.Match]:
    return list(re.finditer(f"({re.escape(markers[0])}|{re.escape(markers[1])})", text))


def _write_guanaco_prompt(row: Mapping[str, str], context: RenderContext) -> str:
    """Return the text up to the last answer, which may be still to come, with the marker of that answer.

    The marker of an answer to come follows a line break if the human's last turn does.
    """
    text = row["text"].rstrip()
    markers = context.markers
    turns = _find_markers(text, markers)
    if turns and turns[-1][1] == markers[1]:
        return text[: turns[-1].end()]
    has_line_break = bool(turns) and text[: turns[-1].start()].endswith("\n")
    return text + "\n" * has_line_break + markers[1]


def continue_dialogue(question: str, before: str, answer: str | None, markers: Sequence[str]) -> str:
    """Return a guanaco dialogue, continued with a question and the marker of the answer to come.

    No line break separates the turns, as in OpenAssistant's data. One does for other markers than
    GUANACO_MARKERS, as in the data that has them (chip2).

    Args:
        question: the text to ask.
        before: the dialogue up to the marker of its last answer; "" for a new dialogue.
        answer: that answer; None for a new dialogue.
        markers: texts that begin the turns of the two speakers.
    """
    separator = "" if markers[0] == GUANACO_MARKERS[0] else "\n"
    dialogue = f"{before}{answer.rstrip()}{separator}" if before and answer is not None else ""
    return f"{dialogue}{markers[0]} {question}{separator}{markers[1]}"


def _begin_dialogue(text: str, markers: Sequence[str]) -> str:
    return continue_dialogue(text, "", None, markers)


def _make_user_messages(text: str, _markers) -> list[dict]:
    return [{"role": "user", "content": text}]


def _render_chat(row: Mapping, context: RenderContext) -> Rendered:
    """Render messages by the tokenizer's chat template. Assistant turns are learned, with the token after."""
    chat = context.chat
    rendered = chat.render(row["messages"], row.get("tools"))
    return Rendered(
        rendered.text,
        rendered.learned,
        needs_eos=False,
        add_special_tokens=False,
        marker=chat.marker,
        last_answer_index=rendered.last_answer_index,
        has_empty_thought=rendered.has_empty_thought,
    )


def _write_chat_prompt(row: Mapping, context: RenderContext) -> str:
    return context.chat.render_prompt(row["messages"], row.get("tools"))


def _check_chat(row: Mapping, error_prefix: str) -> dict:
    messages = check_messages(row["messages"], error_prefix)
    tools = check_tools(row.get("tools"), error_prefix)
    return {"messages": messages} | ({"tools": tools} if tools else {})


FORMATS = {
    "chat": Format(
        _render_chat,
        _write_chat_prompt,
        CHAT_SCHEMAS,
        "each turn of the assistant, with the token that ends it",
        _check_chat,
        is_conversation=True,
        make_question=_make_user_messages,
        add_special_tokens=False,
        marker=lambda context: context.chat.marker,
        question_header=lambda context: context.chat.endings.question_header,
    ),
    "alpaca": Format(
        _render_alpaca,
        _write_alpaca_prompt,
        (ALPACA_COLUMNS,),
        "the output, and EOS",
        question_header=lambda context: ALPACA_HEADER,
    ),
    "alpaca_stanford": Format(
        _render_stanford,
        _write_stanford_prompt,
        (replace(ALPACA_COLUMNS, auto=Auto.NEVER),),
        "the output, and EOS",
        question_header=lambda context: ALPACA_HEADER,
    ),
    "qa": Format(_render_qa, _write_qa_prompt, QA_SCHEMAS, "the answer, and EOS"),
    "prompt_completion": Format(
        _render_prompt_completion,
        _write_plain_prompt,
        COMPLETION_SCHEMAS,
        "the completion, which follows the prompt directly, and EOS",
    ),
    "guanaco": Format(
        _render_guanaco,
        _write_guanaco_prompt,
        (replace(TEXT_COLUMN, note="with `### Human:` and `### Assistant:`, or a recipe's `markers`"),),
        "every answer; EOS after the last",
        is_conversation=True,
        make_question=_begin_dialogue,
        has_markers=True,
        marker=lambda context: context.markers[0],
        question_header=lambda context: context.markers[0],
    ),
    "completion": Format(_render_completion, _write_completion_prompt, (TEXT_COLUMN,), "all of it, and EOS"),
}


def check_row(
    row: Mapping,
    form: Format,
    error_prefix: str,
    needs_answer: bool = True,
    schemas: Sequence[Schema] = (),
) -> dict:
    """Return a row of any schema of a format as the format renders it: texts, or checked messages and tools.

    Args:
        row: {column: value}.
        form: the format.
        error_prefix: begins each error.
        needs_answer: whether the column of the answer must have a value.
        schemas: those of the format that the row may have; () = all.

    Raises UserError for columns that are missing or unusable.
    """
    schemas = schemas or form.schemas
    schema = find_schema(row, schemas, needs_answer) or schemas[0]
    return form.check(schema.read(row, error_prefix, needs_answer), error_prefix)
