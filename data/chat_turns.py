"""Where the turns of a conversation lie in the text that a chat template writes of it.

A turn begins where the template, given the messages before it, asks for the answer. It ends with its own text
and the token that closes it. Templates are programs, and nothing tells what they did with a message, so turns
are located by comparing the text of the whole conversation with the texts of parts and variants of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import jinja2

from data.answers import is_empty

# What a chat template can raise for a row: it is a program, in a sandbox.
TEMPLATE_ERRORS = (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
                   AssertionError, RecursionError, MemoryError)  # fmt: skip
PROBE = "\uf8ffprobe\uf8ff"  # stands for an answer; a private character, so in no template or text
# What looks like a token that the tokenizer may not know: <|end|>, <end_of_turn>, [/INST]
TOKEN_LIKE = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]")
ASKED = "\uf8ffasked\uf8ff"  # stands for a question
_HELLO = {"role": "user", "content": "Hi"}
# Ways for a conversation to begin: some templates need a system message, or more than one turn.
OPENINGS = (
    [_HELLO],
    [{"role": "system", "content": "Be kind."}, _HELLO],
    [_HELLO, {"role": "assistant", "content": "Yo"}, _HELLO],
)
NEAR = 100  # characters around a place in which such a token may lie

Span = tuple[int, int]  # [start, end) in characters
Show = Callable[..., str]  # ChatTemplate.show for the tools of one conversation


@dataclass(frozen=True)
class Closings:
    """What a template writes behind messages.

    Args:
        last: behind the last answer of a conversation.
        user: behind a user's message that nothing follows.
        between: between an answer and the header of a user's message that follows it.
        tokens: the tokenizer's added tokens, which are never split.
    """

    last: str
    user: str
    between: str
    tokens: tuple[str, ...]

    def closed(self, tail: str, closing: str) -> str:
        """The beginning of `tail`, the text behind a turn, that closes the turn.

        closing: what would close it as the last turn. Where that is not in `tail`, earlier turns are closed
        as a user's message is (gpt-oss), or by what stands before the next header.
        """
        candidates = (self.shared(tail, text) for text in (closing, self.user, self.between))
        return next((text for text in candidates if text.strip()), "")

    def shared(self, a: str, b: str) -> str:
        """The common beginning of two texts. A token in which they first differ is left out."""
        end = common_length(a, b)
        if end == len(b):
            return a[:end]
        for text in (a, b):
            inside = [begin for begin, stop in self._tokens_near(text, end) if begin < end < stop]
            end = min([end, *inside])
        return a[:end]

    def shared_end(self, a: str, b: str) -> str:
        """The common end of two texts. A token in which they last differ is left out."""
        length = common_length(a[::-1], b[::-1])
        for text in (a, b):
            begin = len(text) - length
            inside = [stop for start, stop in self._tokens_near(text, begin) if start < begin < stop]
            length = min([length, *(len(text) - stop for stop in inside)])
        return a[len(a) - length :]

    def _tokens_near(self, text: str, place: int) -> Iterator[Span]:
        for token in self.tokens:
            at = text.find(token, max(place - len(token), 0), place + len(token))
            if at >= 0:
                yield at, at + len(token)
        for match in TOKEN_LIKE.finditer(text, max(place - NEAR, 0), place + NEAR):
            yield match.span()


@dataclass(frozen=True)
class Turns:
    """Locates the turns of one conversation. text: what `show` makes of all its messages; special: the
    tokenizer's BOS and EOS, as texts write them."""

    messages: list[dict]
    text: str
    show: Show
    closings: Closings
    special: tuple[str | None, ...]

    def shows_nothing(self, i: int) -> bool:
        """Whether turn i is empty: no content but BOS and EOS, and the template shows nothing else of it."""
        content = self.messages[i].get("content", "")
        if not is_empty(content, self.special):
            return False
        bare = answer(content)
        return self.messages[i] == bare or attempt(self.show, self._with(i, bare)) == self.text

    def span(self, i: int) -> Span:
        """Where the assistant's turn i lies, with what closes it. Raises ValueError for a turn that the
        template does not show as it is."""
        before = attempt(self.show, self.messages[:i], add_generation_prompt=True) if i else None
        if before is None or not self.text.startswith(before):
            return self._by_probe(i, None)
        last = i + 1 == len(self.messages)
        until = self.text if last else attempt(self.show, self.messages[: i + 1]) or ""
        # Calls may be closed by a token of their own, as in gpt-oss.
        own = not until.endswith(self.closings.last)
        end = len(until) if own else len(until) - len(self.closings.last)
        if end < len(before) or not self.text.startswith(until[:end]):
            return self._by_probe(i, len(before))
        closed = "" if own else self.closings.closed(self.text[end:], self.closings.last)
        return len(before), end + len(closed)

    def _by_probe(self, i: int, start: int | None) -> Span:
        """Locates turn i by a probe in its place. For templates that rewrite earlier turns when others
        follow: Qwen3 drops old reasoning, Mistral moves the tools. start: of the turn, if it is known."""
        for variant, name in _variants(self.messages[i]):
            found = around_probe(self.show, self._with(i, variant), name)
            if found is None or not self.text.endswith(found[1]):
                continue
            head, tail = found
            _, closing = around_probe(self.show, [*self.messages[:i], variant], name) or ("", "")
            if start is None:
                start = self._start(i)
            if start is None:
                start = common_length(self.text, head)
            return start, len(self.text) - len(tail) + len(self.closings.closed(tail, closing))
        raise ValueError("the chat template does not show the assistant's text as it is")

    def _start(self, i: int) -> int | None:
        """Where turn i begins, told by a probe in the message before it. None if the template alters that
        message."""
        if not i:
            return None
        probed = [*self.messages[: i - 1], self.messages[i - 1] | {"content": PROBE}]
        found = around_probe(self.show, [*probed, *self.messages[i:]])
        asked = around_probe(partial(self.show, add_generation_prompt=True), probed)
        if found is None or asked is None or not self.text.endswith(found[1]):
            return None
        return len(self.text) - len(found[1]) + len(self.closings.shared(found[1], asked[1]))

    def _with(self, i: int, message: dict) -> list[dict]:
        return [*self.messages[:i], message, *self.messages[i + 1 :]]


def find_closings(show: Show, tokens: tuple[str, ...]) -> Closings:
    """What a template writes behind messages, found out on short conversations. show: ChatTemplate.show;
    tokens: as in Closings."""
    for before in OPENINGS:
        last = around_probe(show, [*before, answer(PROBE)])
        if last is not None:
            break
    else:
        return Closings("", "", "", tokens)
    of_user = around_probe(show, [*before[:-1], before[-1] | {"content": PROBE}]) or ("", "")
    closings = Closings(last[1], of_user[1], "", tokens)
    asked = [*before, answer(PROBE), before[-1] | {"content": ASKED}, answer("Yo")]
    _, tail = around_probe(show, asked) or ("", "")
    segment, found, _ = tail.partition(ASKED)
    if not found:
        return closings
    return replace(closings, between=segment.removesuffix(closings.shared_end(of_user[0], segment)))


def answer(content: str) -> dict:
    """An assistant's message."""
    return {"role": "assistant", "content": content}


def _variants(message: dict) -> Iterator[tuple[dict, str]]:
    """(a variant of an assistant's message that has PROBE in it, what it stands for); the likeliest first."""
    calls = message.get("tool_calls")
    if calls:
        function = calls[-1].get("function")
        named = calls[-1] | ({"function": function | {"name": PROBE}} if function else {"name": PROBE})
        yield message | {"tool_calls": [*calls[:-1], named]}, (function or calls[-1]).get("name", "")
    yield answer(PROBE), ""
    yield message | {"content": PROBE}, ""


def around_probe(show: Show, messages: list[dict], name: str = "") -> tuple[str, str] | None:
    """(the text before the probe, the text behind it); None if the template does not show it. name: what the
    probe stands for, in case the text repeats it."""
    head, found, tail = (attempt(show, messages) or "").partition(PROBE)
    return (head, tail.replace(PROBE, name) if name else tail) if found else None


def common_length(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def attempt(show: Show, messages: list[dict], **options) -> str | None:
    """The text of messages; None if the template refuses them, as a part of a conversation that it takes."""
    try:
        return show(messages, **options)
    except TEMPLATE_ERRORS:
        return None
