"""The `chat` format: conversations through the tokenizer's chat template, and where their turns lie in the text.

What is learned of a conversation is each assistant turn, from where the template's generation prompt ends to the
token that closes the turn. Templates with `{% generation %}` markers say it themselves. In all others a turn is found
by comparing what the template writes for the whole conversation with what it writes for parts and variants of it:
templates are programs, and nothing else tells what they did with a message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from functools import cached_property, partial
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from data.messages import plain, with_arguments
from data.template_date import with_day

# What a chat template can raise for a row: it is a program, in a sandbox.
TEMPLATE_ERRORS = (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
                   AssertionError, RecursionError, MemoryError)  # fmt: skip

PROBE = "\uf8ffprobe\uf8ff"  # stands for an answer; a private character, so in no template or text
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What looks like a token that the tokenizer may not know: <|end|>, <end_of_turn>, [/INST]
TOKEN_LIKE = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]")

Span = tuple[int, int]
Show = Callable[..., str]


class ChatTemplate:
    """A tokenizer's chat template, and what it does with a conversation.

    Args:
        tokenizer: transformers' tokenizer; of one without a template the methods raise ValueError.
        day: YYYY-MM-DD, what the template gets for today's date; None = today.
    """

    def __init__(self, tokenizer: Any, day: str | None = None):
        self.tokenizer, self.day = tokenizer, day
        self._templates: dict[bool, str] = {}  # by whether there are tools, which may have one of their own

    def show(
        self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation, as transformers renders it."""
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self._template(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def render(self, messages: list[dict], tools: list[dict] | None = None) -> tuple[str, list[Span]]:
        """(the text, the learned ranges of its characters). messages, tools: as data/messages.py makes them.

        Raises ValueError, or what the template raises, if it does not show what is to be learned.
        """
        wanted = [m["role"] == "assistant" and m.get("train", True) for m in messages]
        messages, show = self.fitted(messages), partial(self.show, tools=tools)
        text = show(messages)
        taught = [
            i for i, m in enumerate(messages) if wanted[i] and not _shows_nothing(messages, i, text, show)
        ]
        if MARKERS.search(self._template(tools)):
            return text, self._marked(messages, tools, text, taught)
        turns: list[Span] = []
        for i in taught:
            start, end = self._turn(messages, i, text, show)
            end = start + len(text[start:end].rstrip())  # a line break behind the turn is the template's
            if start >= end:
                raise ValueError("the chat template does not show the assistant's text")
            if turns and start < turns[-1][1]:
                raise ValueError("the chat template does not keep the assistant's turns apart")
            turns.append((start, end))
        return text, turns

    def prompt(self, given: list[dict], tools: list[dict] | None = None) -> str:
        """What the template shows before the next answer, where training begins to learn: with its generation
        prompt, unless it shows no answer behind that (DeepSeek R1's opens a thought). Raises ValueError if there is
        nothing to be answered."""
        messages, show = self.fitted(given), partial(self.show, tools=tools)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError("there is no message to be answered")
        wanted = show(messages, add_generation_prompt=True)
        head, _, _ = show([*messages, _answer(PROBE)]).partition(PROBE)
        return wanted if head.startswith(wanted) else head[: _common(head, wanted)]

    def stops(self) -> list[int]:
        """Ids of the tokens that close an answer or a tool call, as far as these are tokens of their own."""
        added = {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items()}
        closing = self.ending.lstrip()
        stops = [token for token in added if closing.startswith(token)]
        call = (self._call_shown or "").rpartition("}")[2].rstrip()
        if not any(token in call for token in stops):  # gpt-oss closes calls by a token of their own
            stops += [token for token in added if call.endswith(token)]
        return sorted({added[token] for token in stops})

    @cached_property
    def ending(self) -> str:
        """What the template writes behind the last answer of a conversation: "" if nothing."""
        return (_try(self.show, [_message("user", "Hi"), _answer(PROBE)]) or "").partition(PROBE)[2]

    def fitted(self, messages: list[dict]) -> list[dict]:
        """The messages in the form that the template can read: of arguments of tool calls, and of content that is
        missing."""
        made = with_arguments(plain(messages), as_text=self._takes_text)
        if self._needs_content:
            made = [{"content": ""} | m for m in made]
        return made

    # What the template is, found out once

    def _template(self, tools: list[dict] | None) -> str:
        if bool(tools) not in self._templates:
            self._templates[bool(tools)] = with_day(self.tokenizer.get_chat_template(tools=tools), self.day)
        return self._templates[bool(tools)]

    @cached_property
    def _user_ending(self) -> str:
        """What it writes behind a user's message that nothing follows."""
        return (_try(self.show, [_message("user", PROBE)]) or "").partition(PROBE)[2]

    def _show_call(self, arguments: dict | str, **more) -> str | None:
        """A tool call; None if the template cannot show one like it."""
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return _try(self.show, [_message("user", "Hi"), {"role": "assistant", "tool_calls": [call]} | more])

    @cached_property
    def _takes_text(self) -> bool:
        """Whether arguments must be JSON text, where transformers asks for objects: the template puts them between
        texts (DeepSeek), or would print Python's form of them."""
        shown = self._show_call({"x": "1"}) or self._show_call({"x": "1"}, content="")
        text = '{"x": "1"}'
        return (shown is None and self._show_call(text, content="") is not None) or "{'x'" in (shown or "")

    @cached_property
    def _needs_content(self) -> bool:
        """Whether the template fails for a tool call without content, and takes an empty one."""
        arguments = '{"x": "1"}' if self._takes_text else {"x": "1"}
        return self._show_call(arguments) is None and self._show_call(arguments, content="") is not None

    @cached_property
    def _call_shown(self) -> str | None:
        arguments = '{"x": "1"}' if self._takes_text else {"x": "1"}
        return self._show_call(arguments, **({"content": ""} if self._needs_content else {}))

    # Where a turn lies

    def _marked(
        self, messages: list[dict], tools: list[dict] | None, text: str, taught: Collection[int]
    ) -> list[Span]:
        """The spans of the template's generation markers, but for those of turns that are not `taught`."""
        rendered: Any = render_jinja_template(  # annotated as a text
            conversations=[messages],
            tools=[*tools] if tools else None,
            chat_template=self._template(tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (shown,), (spans,) = rendered
        if shown != text:
            raise ValueError("the chat template shows a conversation otherwise each time")
        show = partial(self.show, tools=tools)
        left_out = [
            self._turn(messages, i, text, show)
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and i not in taught
        ]
        return [
            (start, end)
            for start, end in spans
            if start < end and not any(start < stop and begin < end for begin, stop in left_out)
        ]

    def _turn(self, messages: list[dict], i: int, text: str, show: Show) -> Span:
        """Where turn i lies in `text`, the template's text of all messages, with what closes it.

        It begins where the template, given the messages before it, asks for the answer. It ends with its own text,
        which the messages up to it end with as well, and the closing that stands behind it.
        """
        before = _try(show, messages[:i], add_generation_prompt=True) if i else None
        until = _try(show, messages[: i + 1]) if i + 1 < len(messages) else text
        if before is not None and until is not None and text.startswith(before):
            closing = self.ending if until.endswith(self.ending) else ""
            end = len(until) - len(closing)
            if end >= len(before) and text.startswith(until[:end]):
                return len(before), end + len(self._closed(text[end:], closing))
        return self._probed_turn(messages, i, text, show)

    def _probed_turn(self, messages: list[dict], i: int, text: str, show: Show) -> Span:
        """The same of a template that writes earlier messages otherwise once others follow (Qwen3 drops old reasoning,
        Mistral moves the tools): a probe in the place of the answer, or of a called function's name, tells what stands
        before and behind."""
        for variant, name in _variants(messages[i]):
            head, found, tail = _around_probe(show, [*messages[:i], variant, *messages[i + 1 :]], name)
            if not found or not text.endswith(tail):
                continue
            _, _, closing = _around_probe(show, [*messages[: i + 1][:-1], variant], name)
            start = self._start(messages, i, text, show)
            end = len(text) - len(tail) + len(self._closed(tail, closing))
            return _common(text, head) if start is None else start, end
        raise ValueError("the chat template does not show the assistant's text as it is")

    def _start(self, messages: list[dict], i: int, text: str, show: Show) -> int | None:
        """Where turn i begins: behind the message before it, and what the template writes there when it asks for an
        answer. None if it shows that message otherwise than it is."""
        before = _try(show, messages[:i], add_generation_prompt=True) if i else None
        if before is not None and text.startswith(before):
            return len(before)
        if not i:
            return None
        probed = [*messages[: i - 1], messages[i - 1] | {"content": PROBE}]
        _, found, tail = _around_probe(show, [*probed, *messages[i:]])
        _, asked, prompt = _around_probe(partial(show, add_generation_prompt=True), probed)
        if not found or not asked or not text.endswith(tail):
            return None
        return len(text) - len(tail) + len(self._shared(tail, prompt))

    def _closed(self, tail: str, closing: str) -> str:
        """What closes the turn that `tail` stands behind. closing: what would, if it were the last turn; where a last
        turn is closed by another token (gpt-oss), earlier ones are as a user's message is."""
        shared = self._shared(tail, closing)
        return shared if shared.strip() or not closing.strip() else self._shared(tail, self._user_ending)

    def _shared(self, a: str, b: str) -> str:
        """The common beginning of two texts, in whole tokens: where they part within one it is in neither."""
        end = _common(a, b)
        if end == len(b):
            return a[:end]
        for text in (a, b):
            inside = [begin for begin, stop in self._tokens(text, end) if begin < end < stop]
            end = min([end, *inside])
        return a[:end]

    def _tokens(self, text: str, around: int) -> Iterator[Span]:
        """Where tokens of their own begin and end near a place in a text."""
        near = max(around - 100, 0)
        for token in map(str, self.tokenizer.added_tokens_decoder.values()):
            at = text.find(token, max(around - len(token), 0), around + len(token))
            if at >= 0:
                yield at, at + len(token)
        for match in TOKEN_LIKE.finditer(text, near, around + 100):
            yield match.span()


def _message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _answer(content: str) -> dict:
    return _message("assistant", content)


def _variants(message: dict) -> Iterator[tuple[dict, str]]:
    """(a variant of an assistant's message that has PROBE in it, what it stands for); the likeliest first."""
    calls = message.get("tool_calls")
    if calls:
        function = calls[-1].get("function")
        named = calls[-1] | ({"function": function | {"name": PROBE}} if function else {"name": PROBE})
        yield message | {"tool_calls": [*calls[:-1], named]}, (function or calls[-1]).get("name", "")
    yield _answer(PROBE), ""
    yield message | {"content": PROBE}, ""


def _around_probe(show: Show, messages: list[dict], name: str = "") -> tuple[str, bool, str]:
    """(what is shown before the probe, whether it is shown, what is shown behind it). name: what the probe stands
    for, where the text may repeat it."""
    head, found, tail = (_try(show, messages) or "").partition(PROBE)
    return head, bool(found), tail.replace(PROBE, name) if name else tail


def _shows_nothing(messages: list[dict], i: int, text: str, show: Show) -> bool:
    """Whether turn i is empty: it has no content, and the template shows nothing else of it."""
    content = messages[i].get("content", "")
    if content.strip():
        return False
    bare = _answer(content)
    return messages[i] == bare or _try(show, [*messages[:i], bare, *messages[i + 1 :]]) == text


def _common(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _try(show: Show, messages: list[dict], **options) -> str | None:
    """The text; None if the template refuses these messages, as part of a conversation that it takes."""
    try:
        return show(messages, **options)
    except TEMPLATE_ERRORS:
        return None
