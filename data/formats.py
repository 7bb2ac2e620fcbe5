"""How a row of a dataset becomes one text, and which parts of that text are learned.

A format is a function from a row to a Rendered; FORMATS lists them with the columns that they need, which
is also how the format of a user's own file is recognised. Beside it stands the function that writes the same
text up to the answer: what a trained model is asked with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from options.errors import UserError, describe

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
    the end of the text and an EOS token follows; special: the tokenizer adds its own BOS and the like; number: of the
    row in its dataset, from 1."""

    text: str
    learned: list[tuple[int, int]]
    ends: bool = True
    special: bool = True
    number: int = 0


@dataclass(frozen=True)
class Format:
    """render(row, tokenizer, markers); needs: columns without which a row is refused; optional: others
    that it reads; prompt(row, tokenizer, markers): the text up to the last answer, which the row may lack; answer:
    the column that holds nothing else; turns: a conversation, which goes on after an answer; question(text, markers):
    what the column `asks` holds where nothing but that text is asked; special: as in Rendered; marked: its text has
    markers."""

    render: Callable[..., Rendered]
    prompt: Callable[..., str]
    needs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    answer: str | None = None
    turns: bool = False
    question: Callable[..., str | list] = lambda text, _markers: text
    special: bool = True
    marked: bool = False

    @property
    def asks(self) -> str:
        """The column that a bare prompt goes into."""
        return self.needs[0]

    def asking(self, text: str, markers: Sequence[str]) -> dict:
        """The row that a bare prompt is, without an answer."""
        return {self.asks: self.question(text, markers)}

    def fits(self, columns: set[str], sample: Mapping, markers: Sequence[str]) -> bool:
        """Whether rows with these columns can be of this format; `sample` tells a dialogue in `text` from plain
        text."""
        return columns >= set(self.needs) and (not self.marked or markers[1] in str(sample.get("text")))


def _prompted(prompt: str, response: str) -> Rendered:
    if not response.strip():
        return Rendered(prompt, [], ends=False)  # an empty answer teaches nothing: dropped and counted
    text = prompt + response
    return Rendered(text, [(len(prompt), len(text))])


def _alpaca_prompt(row: Mapping[str, str], *_) -> str:
    return (ALPACA_INPUT if row.get("input", "").strip() else ALPACA).format_map(row)


def _alpaca(row: Mapping[str, str], *_) -> Rendered:
    return _prompted(_alpaca_prompt(row), row["output"])


def _qa_prompt(row: Mapping[str, str], *_) -> str:
    return (QA_CONTEXT if row.get("context", "").strip() else QA).format_map(row)


def _qa(row: Mapping[str, str], *_) -> Rendered:
    return _prompted(_qa_prompt(row), row["answer"])


def _completion(row: Mapping[str, str], *_) -> Rendered:
    text = row["text"]
    return Rendered(text, [(0, len(text))] if text.strip() else [])


def _completion_prompt(row: Mapping[str, str], *_) -> str:
    return row["text"]


def _guanaco(row: Mapping[str, str], _tokenizer, markers: Sequence[str]) -> Rendered:
    """A dialogue in one text. Turns begin with a marker anywhere: OpenAssistant's have no line breaks."""
    text = row["text"].rstrip()
    turns = _guanaco_turns(text, markers)
    learned, last = [], False
    ends = [turn.start() for turn in turns[1:]] + [len(text)]
    for turn, end in zip(turns, ends, strict=False):  # without a marker there is nothing to learn
        start = turn.end()
        answer = text[start:end].rstrip()  # a line break before the next marker is no part of the answer
        last = turn[1] == markers[1] and bool(answer)
        if last:
            learned.append((start, start + len(answer)))
    return Rendered(text, learned, ends=last)


def _guanaco_turns(text: str, markers: Sequence[str]) -> list[re.Match]:
    return list(re.finditer(f"({re.escape(markers[0])}|{re.escape(markers[1])})", text))


def _guanaco_prompt(row: Mapping[str, str], _tokenizer, markers: Sequence[str]) -> str:
    """Up to the marker of the last turn, if that is an answer; else with the marker of the answer to come, behind
    a line break if that is how the human's last turn begins."""
    text = row["text"].rstrip()
    turns = _guanaco_turns(text, markers)
    if turns and turns[-1][1] == markers[1]:
        return text[: turns[-1].end()]
    broken = bool(turns) and text[: turns[-1].start()].endswith("\n")
    return text + "\n" * broken + markers[1]


def asked(question: str, before: str, answer: str | None, markers: Sequence[str]) -> str:
    """A guanaco dialogue that goes on with a question. before, answer: the text so far, up to its last answer's
    marker, and that answer; "" and None for a new one. Turns follow each other without a line break, as in
    OpenAssistant's, except with markers of another kind, whose data (chip2) has one."""
    between = "" if markers[0] == GUANACO_MARKERS[0] else "\n"
    said = f"{before}{answer.rstrip()}{between}" if before and answer is not None else ""
    return f"{said}{markers[0]} {question}{between}{markers[1]}"


def _first_question(text: str, markers: Sequence[str]) -> str:
    return asked(text, "", None, markers)


def _user_message(text: str, _markers) -> list[dict]:
    return [{"role": "user", "content": text}]


def _chat(row: Mapping[str, list], tokenizer, _markers) -> Rendered:
    """Through the tokenizer's chat template; every assistant turn is learned, with its end-of-turn token."""
    messages = row["messages"]
    show = partial(tokenizer.apply_chat_template, tokenize=False)
    text, learned = show(messages), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        start, end = _turn(messages, i, text, show)
        end = start + len(text[start:end].rstrip())  # a line break behind the turn is the template's
        if start >= end:
            raise ValueError("the chat template does not show the assistant's text")
        learned.append((start, end))
    return Rendered(text, learned, ends=False, special=False)


def _chat_prompt(row: Mapping[str, list], tokenizer, _markers) -> str:
    """What the template shows before the next answer, where training begins to learn: with its generation
    prompt, unless it shows no answer behind that (DeepSeek R1's opens a thought)."""
    messages, show = list(row["messages"]), partial(tokenizer.apply_chat_template, tokenize=False)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError("there is no message to be answered")
    wanted = show(messages, add_generation_prompt=True)
    head, _, _ = show([*messages, {"role": "assistant", "content": PROBE}]).partition(PROBE)
    return wanted if head.startswith(wanted) else head[: _common(head, wanted)]


def turn_ending(tokenizer) -> str:
    """What the chat template writes behind the last answer of a conversation: "" if nothing."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROBE}]
    return tokenizer.apply_chat_template(messages, tokenize=False).partition(PROBE)[2]


def _turn(messages: list[dict], i: int, text: str, show: Callable[..., str]) -> tuple[int, int]:
    """Where turn i lies in `text`, the template's text of all messages.

    It begins where the template, given the messages before it, asks for the answer, and ends where the text
    of the messages up to it ends. Templates may write an earlier turn otherwise than the last one (Qwen3
    drops old reasoning): then what stands in place of a probe is the turn, with what closes a last turn.
    """
    before = show(messages[:i], add_generation_prompt=True) if i else None
    until = show(messages[: i + 1]) if i + 1 < len(messages) else text
    asked = before is not None and text.startswith(before)
    start = len(before or "")
    if asked and text.startswith(until):
        return start, len(until)
    probed = [*messages[:i], messages[i] | {"content": PROBE}, *messages[i + 1 :]]
    head, shown, tail = show(probed).partition(PROBE)
    if not shown or not text.endswith(tail):
        raise ValueError("the chat template does not show the assistant's text as it is")
    if not asked:
        start = _common(text, head)
    closing = show(probed[: i + 1]).partition(PROBE)[2]
    return start, len(text) - len(tail) + (len(closing) if tail.startswith(closing) else 0)


def _common(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


FORMATS = {
    "chat": Format(_chat, _chat_prompt, ("messages",), turns=True, question=_user_message, special=False),
    "alpaca": Format(_alpaca, _alpaca_prompt, ("instruction", "output"), ("input",), answer="output"),
    "qa": Format(_qa, _qa_prompt, ("question", "answer"), ("context",), answer="answer"),
    "guanaco": Format(
        _guanaco, _guanaco_prompt, ("text",), turns=True, question=_first_question, marked=True
    ),
    "completion": Format(_completion, _completion_prompt, ("text",)),
}
GUANACO_MARKERS = ("### Human:", "### Assistant:")
PROBE = "\uf8ffprobe\uf8ff"  # stands for an answer; a private character, so in no template or text


def encode(tokenizer, texts: list[str], special: bool, **options):
    """The tokenizer's result for the texts. Raises UserError if it fails."""
    try:
        return tokenizer(
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )
    except BaseException as e:
        # Of a tokenizer that contradicts itself the tokenizers library raises Exception, or panics, which is none.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UserError(f"--model_name: its tokenizer fails ({describe(e)})") from None


def prompt_ids(text: str, tokenizer, special: bool) -> list[int]:
    """The tokens of a prompt, without the EOS that a tokenizer may put behind every text: training had it behind the
    answer."""
    ids = encode(tokenizer, [text], special)["input_ids"][0]
    added = special and ids and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if added and not text.endswith(tokenizer.eos_token) else ids


def recognise(
    columns: set[str], sample: Mapping, where: str, markers: Sequence[str] = GUANACO_MARKERS
) -> str:
    """The format of rows with these columns; `sample` tells a dialogue in `text` from plain text."""
    for name, form in FORMATS.items():
        if form.fits(columns, sample, markers):
            return name
    known = "; ".join(f"{n}: {', '.join(f.needs)}" for n, f in FORMATS.items())
    raise UserError(f"{where}: columns {', '.join(sorted(columns))} fit no format ({known})")


def checked(row: Mapping, form: Format, where: str, answered: bool = True) -> dict:
    """The row's columns that the format reads, as text. Raises UserError for missing or unusable ones; without
    `answered` the answer's may be missing."""
    missing = [c for c in form.needs if row.get(c) is None and (answered or c != form.answer)]
    if missing:
        found = ", ".join(str(c) for c in row if row[c] is not None)
        raise UserError(f"{where}: nothing in column {', '.join(missing)}; found: {found}")
    if "messages" in form.needs:
        return {"messages": _checked_messages(row["messages"], where)}
    values = {}
    for column in (*form.needs, *form.optional):
        value = row.get(column)
        if value is None:
            value = ""  # an optional column
        if not isinstance(value, str | int | float) or isinstance(value, bool) or value != value:
            raise UserError(f"{where}: column {column} holds a {type(value).__name__}, not a text")
        values[column] = str(value)
    return values


def _checked_messages(messages, where: str) -> list[dict]:
    good = isinstance(messages, list) and bool(messages)
    for message in messages if good else []:
        good = good and isinstance(message, Mapping)
        good = good and all(isinstance(message.get(key), str) for key in ("role", "content"))
    if not good:
        raise UserError(f"{where}: messages must be a list of objects with a role and a content, both texts")
    # Tables give each message every key (tool_calls: None), which a template would take for given.
    return [{k: v for k, v in m.items() if v is not None} for m in messages]
