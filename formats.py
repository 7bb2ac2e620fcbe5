"""How a row of a dataset becomes one text, and which parts of that text are learned.

A format is a function from a row to a Rendered; FORMATS lists them with the columns that they need, which
is also how the format of a user's own file is recognised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from config import UserError

# The prompts of Stanford Alpaca, which most instruction-tuned checkpoints of this kind have seen.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the"
    " request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n### Response:\n"
)
QA = "### Question:\n{question}\n\n### Answer:\n"
QA_CONTEXT = "### Context:\n{context}\n\n### Question:\n{question}\n\n### Answer:\n"


@dataclass(frozen=True)
class Rendered:
    """text; learned: [start, end) character ranges whose tokens are targets; ends: the last range reaches
    the end of the text and an EOS token follows; special: the tokenizer adds its own BOS and the like."""

    text: str
    learned: list[tuple[int, int]]
    ends: bool = True
    special: bool = True


@dataclass(frozen=True)
class Format:
    """render(row, tokenizer, markers); needs: columns without which a row is refused; optional: others
    that it reads."""

    render: Callable[..., Rendered]
    needs: tuple[str, ...]
    optional: tuple[str, ...] = ()


def _prompted(prompt: str, response: str) -> Rendered:
    if not response.strip():
        return Rendered(prompt, [], ends=False)  # an empty answer teaches nothing: dropped and counted
    text = prompt + response
    return Rendered(text, [(len(prompt), len(text))])


def _alpaca(row: Mapping[str, str], *_) -> Rendered:
    template = ALPACA_INPUT if row.get("input", "").strip() else ALPACA
    return _prompted(template.format_map(row), row["output"])


def _qa(row: Mapping[str, str], *_) -> Rendered:
    template = QA_CONTEXT if row.get("context", "").strip() else QA
    return _prompted(template.format_map(row), row["answer"])


def _completion(row: Mapping[str, str], *_) -> Rendered:
    text = row["text"]
    return Rendered(text, [(0, len(text))], ends=bool(text.strip()))


def _guanaco(row: Mapping[str, str], _tokenizer, markers: tuple[str, str]) -> Rendered:
    """A dialogue in one text. Turns begin with a marker anywhere: OpenAssistant's have no line breaks."""
    text = row["text"].rstrip()
    turns = list(re.finditer(f"({re.escape(markers[0])}|{re.escape(markers[1])})", text))
    learned, last = [], False
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        start, end = turn.end(), following.start() if following else len(text)
        last = turn[1] == markers[1] and bool(text[start:end].strip())
        if last:
            learned.append((start, end))
    return Rendered(text, learned, ends=last)


def _chat(row: Mapping[str, list], tokenizer, _markers) -> Rendered:
    """Through the tokenizer's chat template; every assistant turn is learned, with its end-of-turn token.

    A turn begins where the template, given the messages before it, asks for the answer. It ends where the
    template's text for the messages up to it ends - or, in templates that write an earlier turn otherwise
    than the last one (Qwen3 drops old reasoning), after its content and the EOS token behind that.
    """
    messages = row["messages"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    learned = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        until = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        content = text.find(message["content"].strip(), _common(text, before))
        if content < 0:
            raise ValueError("the chat template does not show the assistant's text as it is")
        start = len(before) if text.startswith(before) else content
        end = len(until) if text.startswith(until) else content + len(message["content"].strip())
        eos = tokenizer.eos_token or ""
        if (
            eos and eos in text[start:end]
        ):  # white space behind the EOS token is the template's, not an answer
            end = start + text[start:end].rindex(eos) + len(eos)
        elif eos and text.startswith(eos, end):
            end += len(eos)
        learned.append((start, end))
    return Rendered(text, learned, ends=False, special=False)


def _common(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


FORMATS = {
    "chat": Format(_chat, ("messages",)),
    "alpaca": Format(_alpaca, ("instruction", "output"), ("input",)),
    "qa": Format(_qa, ("question", "answer"), ("context",)),
    "guanaco": Format(_guanaco, ("text",)),
    "completion": Format(_completion, ("text",)),
}
GUANACO_MARKERS = ("### Human:", "### Assistant:")


def recognise(columns: set[str], sample: Mapping, where: str) -> str:
    """The format of rows with these columns; `sample` tells a dialogue in `text` from plain text."""
    for name, form in FORMATS.items():
        if columns >= set(form.needs):
            if name == "guanaco" and GUANACO_MARKERS[1] not in str(sample.get("text")):
                continue
            return name
    known = "; ".join(f"{n}: {', '.join(f.needs)}" for n, f in FORMATS.items())
    raise UserError(f"{where}: columns {', '.join(sorted(columns))} fit no format ({known})")


def checked(row: Mapping, form: Format, where: str) -> dict:
    """The row's columns that the format reads, as text. Raises UserError for missing or unusable ones."""
    missing = [c for c in form.needs if row.get(c) is None]
    if missing:
        raise UserError(f"{where}: no column {', '.join(missing)}; found: {', '.join(map(str, row))}")
    if "messages" in form.needs:
        return {"messages": _checked_messages(row["messages"], where)}
    values = {}
    for column in (*form.needs, *form.optional):
        value = row.get(column)
        if value is None:
            value = ""  # an optional column
        if not isinstance(value, str | int | float):
            raise UserError(f"{where}: column {column} holds a {type(value).__name__}, not a text")
        values[column] = str(value)
    return values


def _checked_messages(messages, where: str) -> list[dict]:
    good = isinstance(messages, list) and messages
    for message in messages if good else []:
        good = good and isinstance(message, Mapping)
        good = good and all(isinstance(message.get(key), str) for key in ("role", "content"))
    if not good:
        raise UserError(f"{where}: messages must be a list of objects with a role and a content, both texts")
    return [dict(m) for m in messages]
