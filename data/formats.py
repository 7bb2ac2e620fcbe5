"""How a row of a dataset becomes one text, and which parts of that text are learned.

A format is a function from a row to a Rendered; FORMATS lists them with the columns that they need, by which
data/recognition.py tells the format of a user's own file. Beside it stands the function that writes the same
text up to the answer: what a trained model is asked with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data.chat import ChatTemplate
from data.messages import checked_messages, checked_tools
from options.errors import UserError, join_names
from options.exact_json import number_text

# Alpaca's prompts as alpaca-lora, axolotl and most later programs write them: the answer begins on a line of
# its own.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the"
    " request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n### Response:\n"
)
# As Stanford's own train.py and fsdp_qlora write them: the answer follows the colon.
STANFORD, STANFORD_INPUT = ALPACA.removesuffix("\n"), ALPACA_INPUT.removesuffix("\n")
GUANACO_MARKERS = ("### Human:", "### Assistant:")
QA = "### Question:\n{question}\n\n### Answer:\n"
QA_CONTEXT = "### Context:\n{context}\n\n### Question:\n{question}\n\n### Answer:\n"


@dataclass(frozen=True)
class Rendered:
    """text; learned: [start, end) character ranges whose tokens are targets; ends: the last range reaches
    the end of the text and an EOS token follows; special: the tokenizer adds its own BOS and the like;
    number: of the row in its dataset, from 1; marker: a text that ends an answer where no token does; last:
    the range that the last answer begins with."""

    text: str
    learned: list[tuple[int, int]]
    ends: bool = True
    special: bool = True
    number: int = 0
    marker: str | None = None
    last: int = -1

    @property
    def last_answer(self) -> tuple[int, int]:
        """Its range, which may be several of the learned ones with text of the template's between them."""
        return self.learned[max(self.last, -len(self.learned))][0], self.learned[-1][1]


@dataclass(frozen=True)
class RenderContext:
    """What a format renders rows with.

    Args:
        tokenizer: its chat template is the `chat` format's; other formats need none.
        markers: of the two speakers in a guanaco text.
        day: YYYY-MM-DD, what a chat template that writes today's date gets; None = today.
    """

    tokenizer: Any = None
    markers: Sequence[str] = GUANACO_MARKERS
    day: str | None = None

    @cached_property
    def chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.day)


@dataclass(frozen=True)
class Format:
    """render(row, context); needs: columns without which a row is refused; optional: others
    that it reads; prompt(row, context): the text up to the last answer, which the row may lack; answer:
    the column that holds nothing else; turns: a conversation, which goes on after an answer; question(text,
    markers): what the column `asks` holds where nothing but that text is asked; special: as in Rendered;
    marked: its text has markers; marker(context): the text that ends an answer, where no token does; named:
    it is used only where it is asked for by name, never recognised."""

    render: Callable[..., Rendered]
    prompt: Callable[..., str]
    needs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    answer: str | None = None
    turns: bool = False
    question: Callable[..., str | list] = lambda text, _markers: text
    special: bool = True
    marked: bool = False
    marker: Callable[[RenderContext], str | None] = lambda context: None
    named: bool = False

    @property
    def asks(self) -> str:
        """The column that a bare prompt goes into."""
        return self.needs[0]

    def asking(self, text: str, markers: Sequence[str]) -> dict:
        """The row that a bare prompt is, without an answer."""
        return {self.asks: self.question(text, markers)}


def _prompted(prompt: str, response: str) -> Rendered:
    if not response.strip():
        return Rendered(prompt, [], ends=False)  # an empty answer teaches nothing: dropped and counted
    text = prompt + response
    return Rendered(text, [(len(prompt), len(text))])


def _alpaca_prompt(row: Mapping[str, str], _context: RenderContext | None = None) -> str:
    return (ALPACA_INPUT if row.get("input", "").strip() else ALPACA).format_map(row)


def _alpaca(row: Mapping[str, str], _context: RenderContext | None = None) -> Rendered:
    return _prompted(_alpaca_prompt(row), row["output"])


def _stanford_prompt(row: Mapping[str, str], _context: RenderContext | None = None) -> str:
    return (STANFORD_INPUT if row.get("input", "") else STANFORD).format_map(row)  # an input of spaces is one


def _stanford(row: Mapping[str, str], _context: RenderContext | None = None) -> Rendered:
    return _prompted(_stanford_prompt(row), row["output"])


def _qa_prompt(row: Mapping[str, str], _context: RenderContext | None = None) -> str:
    return (QA_CONTEXT if row.get("context", "").strip() else QA).format_map(row)


def _qa(row: Mapping[str, str], _context: RenderContext | None = None) -> Rendered:
    return _prompted(_qa_prompt(row), row["answer"])


def _completion(row: Mapping[str, str], _context: RenderContext | None = None) -> Rendered:
    text = row["text"]
    return Rendered(text, [(0, len(text))] if text.strip() else [])


def _completion_prompt(row: Mapping[str, str], _context: RenderContext | None = None) -> str:
    return row["text"]


def _guanaco(row: Mapping[str, str], context: RenderContext) -> Rendered:
    """A dialogue in one text. Turns begin with a marker anywhere: OpenAssistant's have no line breaks."""
    text = row["text"].rstrip()
    markers = context.markers
    turns = _guanaco_turns(text, markers)
    learned, last = [], False
    ends = [turn.start() for turn in turns[1:]] + [len(text)]
    for turn, end in zip(turns, ends, strict=False):  # without a marker there is nothing to learn
        start = turn.end()
        answer = text[start:end].rstrip()  # a line break before the next marker is no part of the answer
        last = turn[1] == markers[1] and bool(answer)
        if last:
            learned.append((start, start + len(answer)))
    return Rendered(text, learned, ends=last, marker=markers[0])


def _guanaco_turns(text: str, markers: Sequence[str]) -> list[re.Match]:
    return list(re.finditer(f"({re.escape(markers[0])}|{re.escape(markers[1])})", text))


def _guanaco_prompt(row: Mapping[str, str], context: RenderContext) -> str:
    """Up to the marker of the last turn, if that is an answer; else with the marker of the answer to come,
    behind a line break if that is how the human's last turn begins."""
    text = row["text"].rstrip()
    markers = context.markers
    turns = _guanaco_turns(text, markers)
    if turns and turns[-1][1] == markers[1]:
        return text[: turns[-1].end()]
    broken = bool(turns) and text[: turns[-1].start()].endswith("\n")
    return text + "\n" * broken + markers[1]


def asked(question: str, before: str, answer: str | None, markers: Sequence[str]) -> str:
    """A guanaco dialogue that goes on with a question. before, answer: the text so far, up to its last
    answer's marker, and that answer; "" and None for a new one. Turns follow each other without a line break,
    as in OpenAssistant's, except with markers of another kind, whose data (chip2) has one."""
    between = "" if markers[0] == GUANACO_MARKERS[0] else "\n"
    said = f"{before}{answer.rstrip()}{between}" if before and answer is not None else ""
    return f"{said}{markers[0]} {question}{between}{markers[1]}"


def _first_question(text: str, markers: Sequence[str]) -> str:
    return asked(text, "", None, markers)


def _user_message(text: str, _markers) -> list[dict]:
    return [{"role": "user", "content": text}]


def _chat(row: Mapping, context: RenderContext) -> Rendered:
    """Through the tokenizer's chat template; every assistant turn is learned, with its end-of-turn token."""
    chat = context.chat
    shown = chat.render(row["messages"], row.get("tools"))
    return Rendered(shown.text, shown.learned, ends=False, special=False, marker=chat.marker, last=shown.last)


def _chat_prompt(row: Mapping, context: RenderContext) -> str:
    return context.chat.prompt(row["messages"], row.get("tools"))


FORMATS = {
    "chat": Format(
        _chat,
        _chat_prompt,
        ("messages",),
        ("tools",),
        turns=True,
        question=_user_message,
        special=False,
        marker=lambda context: context.chat.marker,
    ),
    "alpaca": Format(_alpaca, _alpaca_prompt, ("instruction", "output"), ("input",), answer="output"),
    "alpaca_stanford": Format(
        _stanford, _stanford_prompt, ("instruction", "output"), ("input",), answer="output", named=True
    ),
    "qa": Format(_qa, _qa_prompt, ("question", "answer"), ("context",), answer="answer"),
    "guanaco": Format(
        _guanaco,
        _guanaco_prompt,
        ("text",),
        turns=True,
        question=_first_question,
        marked=True,
        marker=lambda context: context.markers[0],
    ),
    "completion": Format(_completion, _completion_prompt, ("text",)),
}


def checked(row: Mapping, form: Format, where: str, answered: bool = True) -> dict:
    """The row's columns that the format reads, as text. Raises UserError for missing or unusable ones;
    without `answered` the answer's may be missing."""
    missing = [c for c in form.needs if row.get(c) is None and (answered or c != form.answer)]
    if missing:
        found = join_names([str(column) for column in row if row[column] is not None])
        raise UserError(f"{where}: nothing in column {', '.join(missing)}; found: {found}")
    if "messages" in form.needs:
        messages, tools = checked_messages(row["messages"], where), checked_tools(row.get("tools"), where)
        return {"messages": messages} | ({"tools": tools} if tools else {})
    values = {}
    for column in (*form.needs, *form.optional):
        value = row.get(column)
        if value is None:
            value = ""  # an optional column
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise UserError(f"{where}: column {column} holds a {type(value).__name__}, not a text")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"{where}: column {column} holds {value} as a number; leave the row out, or write a text"
            )
        values[column] = value if isinstance(value, str) else number_text(value)
    return values
