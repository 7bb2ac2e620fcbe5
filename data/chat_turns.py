"""Locate the turns of a conversation in the text that a chat template writes of it.

A turn begins where the template, given the messages before it, asks for the answer. It ends with its own text
and the token that ends it. Templates are programs, and nothing reports what they did with a message, so turns
are located by comparing the text of the whole conversation with the texts of parts and variants of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import jinja2

from data.answers import is_empty_answer

# What a chat template can raise for a row: it is a program, in a sandbox.
TEMPLATE_ERRORS = (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
                   AssertionError, RecursionError, MemoryError)  # fmt: skip
# Placeholders for an answer and a question. Their private character is in no template or text.
PROBE = "\uf8ffprobe\uf8ff"
QUESTION_PROBE = "\uf8ffasked\uf8ff"
# Texts that look like a token that the tokenizer may not know: <|end|>, <end_of_turn>, [/INST]
TOKEN_LIKE = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]")
DIGIT = re.compile(r"\d")
TOKEN_RADIUS = 100  # characters around an index within which such a token can be
HELLO = {"role": "user", "content": "Hi"}
# Ways for a conversation to begin: some templates need a system message, or more than one turn.
OPENINGS = (
    [HELLO],
    [{"role": "system", "content": "Be kind."}, HELLO],
    [HELLO, {"role": "assistant", "content": "Yo"}, HELLO],
)

Span = tuple[int, int]  # [start, end) in characters
ApplyTemplate = Callable[..., str]  # ChatTemplate.apply with the tools of one conversation


@dataclass(frozen=True)
class TurnEndings:
    """Texts that a template writes after messages.

    Attributes:
        after_answer: after the last answer of a conversation.
        after_user: after a user's message that nothing follows.
        between_turns: between an answer and the header of the user's message that follows it.
        next_header: the header of the next answer, if the template writes it after each conversation,
            whatever add_generation_prompt is. It is not part of after_answer.
        added_tokens: the tokenizer's added tokens, which are never split.
        question_header: begins each user's message; "" if it is not known.
    """

    after_answer: str
    after_user: str
    between_turns: str
    added_tokens: tuple[str, ...]
    next_header: str = ""
    question_header: str = ""

    def find_ending(self, tail: str, last_ending: str) -> str:
        """Return the beginning of `tail`, the text after a turn, that ends the turn; "" if none does.

        last_ending: the text that would end it as the last turn. If that is not in `tail`, earlier turns end
        like a user's message (gpt-oss), or with the text before the next header.
        """
        endings = (last_ending, self.after_user, self.between_turns)
        candidates = (self.common_prefix(tail, text) for text in endings)
        return next((text for text in candidates if text.strip()), "")

    def common_prefix(self, a: str, b: str) -> str:
        """Return the common prefix of two texts, without a token in which they first differ."""
        end = common_prefix_length(a, b)
        if end == len(b):
            return a[:end]
        for text in (a, b):
            split_tokens = [start for start, stop in self._tokens_near(text, end) if start < end < stop]
            end = min([end, *split_tokens])
        return a[:end]

    def find_header(self, first: str, later: str) -> str:
        """Return the end of `later` that is the same in `first`, without a token in which they last differ.

        first, later: the texts before the first and before a later question, which end with its header. All
        digits count as equal, since ChatGLM's header numbers the questions: `[Round 2]`.
        """
        a, b = (DIGIT.sub("0", text) for text in (first, later))
        length = common_prefix_length(a[::-1], b[::-1])
        for text in (first, later):
            begin = len(text) - length
            split_tokens = [stop for start, stop in self._tokens_near(text, begin) if start < begin < stop]
            length = min([length, *(len(text) - stop for stop in split_tokens)])
        return later[len(later) - length :]

    def _tokens_near(self, text: str, index: int) -> Iterator[Span]:
        """Yield the spans of tokens, and of texts that look like one, near an index of the text."""
        for token in self.added_tokens:
            start = text.find(token, max(index - len(token), 0), index + len(token))
            if start >= 0:
                yield start, start + len(token)
        for match in TOKEN_LIKE.finditer(text, max(index - TOKEN_RADIUS, 0), index + TOKEN_RADIUS):
            yield match.span()


@dataclass(frozen=True)
class Turns:
    """Locates the turns of one conversation.

    Attributes:
        messages: of the conversation.
        text: the text that `apply` returns for all its messages.
        apply: ChatTemplate.apply with the conversation's tools.
        endings: texts that the template writes after messages.
        special_texts: the tokenizer's BOS and EOS as texts write them; None = it has none.
    """

    messages: list[dict]
    text: str
    apply: ApplyTemplate
    endings: TurnEndings
    special_texts: tuple[str | None, ...]

    def is_empty_turn(self, i: int) -> bool:
        """Return whether turn i has no content but BOS and EOS, and the template shows nothing else of it."""
        content = self.messages[i].get("content", "")
        if not is_empty_answer(content, self.special_texts):
            return False
        bare = make_answer(content)
        return self.messages[i] == bare or try_apply(self.apply, self._replace_message(i, bare)) == self.text

    def find_span(self, i: int) -> Span:
        """Return the span of the assistant's turn i, with the token that ends it.

        Raises ValueError for a turn that the template does not show unchanged.
        """
        before = try_apply(self.apply, self.messages[:i], add_generation_prompt=True) if i else None
        if before is None or not self.text.startswith(before):
            return self._find_span_by_probe(i, None)
        is_last = i + 1 == len(self.messages)
        until = self.text if is_last else try_apply(self.apply, self.messages[: i + 1]) or ""
        until = until.removesuffix(self.endings.next_header)
        # Calls may end with a token of their own, as in gpt-oss.
        has_own_ending = not until.endswith(self.endings.after_answer)
        end = len(until) if has_own_ending else len(until) - len(self.endings.after_answer)
        if end < len(before) or not self.text.startswith(until[:end]):
            return self._find_span_by_probe(i, len(before))
        ending = (
            "" if has_own_ending else self.endings.find_ending(self.text[end:], self.endings.after_answer)
        )
        return len(before), end + len(ending)

    def _find_span_by_probe(self, i: int, start: int | None) -> Span:
        """Return the span of turn i, located by a probe in its place.

        Some templates rewrite earlier turns when others follow: Qwen3's drops old reasoning, Mistral's moves
        the tools. start: of the turn, if it is known. Raises ValueError if the text is not shown unchanged.
        """
        for variant, name in _probe_variants(self.messages[i]):
            split = split_at_probe(self.apply, self._replace_message(i, variant), name)
            if split is None or not self.text.endswith(split[1]):
                continue
            head, tail = split
            _, last_ending = split_at_probe(self.apply, [*self.messages[:i], variant], name) or ("", "")
            last_ending = last_ending.removesuffix(self.endings.next_header)
            if start is None:
                start = self._find_start(i)
            if start is None:
                start = common_prefix_length(self.text, head)
            return start, len(self.text) - len(tail) + len(self.endings.find_ending(tail, last_ending))
        raise ValueError("the chat template does not show the assistant's text as it is")

    def _find_start(self, i: int) -> int | None:
        """Return where turn i begins, located by a probe in the message before it.

        Returns None if the template alters that message.
        """
        if not i:
            return None
        probed = [*self.messages[: i - 1], self.messages[i - 1] | {"content": PROBE}]
        split = split_at_probe(self.apply, [*probed, *self.messages[i:]])
        prompt = split_at_probe(partial(self.apply, add_generation_prompt=True), probed)
        if split is None or prompt is None or not self.text.endswith(split[1]):
            return None
        return len(self.text) - len(split[1]) + len(self.endings.common_prefix(split[1], prompt[1]))

    def _replace_message(self, i: int, message: dict) -> list[dict]:
        return [*self.messages[:i], message, *self.messages[i + 1 :]]


def find_endings(apply: ApplyTemplate, added_tokens: tuple[str, ...]) -> TurnEndings:
    """Return the texts that a template writes after messages, found out on short conversations.

    apply: ChatTemplate.apply. added_tokens: as in TurnEndings.
    """
    for opening in OPENINGS:
        answer = split_at_probe(apply, [*opening, make_answer(PROBE)])
        if answer is not None:
            break
    else:
        return TurnEndings("", "", "", added_tokens)
    user = split_at_probe(apply, [*opening[:-1], opening[-1] | {"content": PROBE}]) or ("", "")
    endings = TurnEndings(answer[1], user[1], "", added_tokens)
    question = opening[-1] | {"content": QUESTION_PROBE}
    _, tail = split_at_probe(apply, [*opening, make_answer(PROBE), question, make_answer("Yo")]) or ("", "")
    segment, found, _ = tail.partition(QUESTION_PROBE)
    if not found:
        return endings
    header = endings.find_header(user[0], segment)
    # After a default system prompt the first question's header follows the same token as a later one's.
    question_header = header.removeprefix(endings.after_answer)
    between_turns = segment.removesuffix(header)
    endings = replace(endings, between_turns=between_turns, question_header=question_header)
    return _split_next_header(endings, apply, opening)


def _split_next_header(endings: TurnEndings, apply: ApplyTemplate, opening: list[dict]) -> TurnEndings:
    """Return the endings with the next answer's header apart, if the template always writes one.

    opening: messages that the template accepts, a user's last.
    """
    conversation = [*opening, make_answer(PROBE)]
    if try_apply(apply, conversation) != try_apply(apply, conversation, add_generation_prompt=True):
        return endings  # the template follows add_generation_prompt
    ending = endings.common_prefix(endings.after_answer, endings.between_turns)
    header = endings.after_answer[len(ending) :]
    user = [*opening[:-1], opening[-1] | {"content": PROBE}]
    _, tail = split_at_probe(apply, [*user, make_answer(QUESTION_PROBE)]) or ("", "")
    if not ending.strip() or not header.strip() or not tail.partition(QUESTION_PROBE)[0].endswith(header):
        return endings
    return replace(endings, after_answer=ending, next_header=header)


def make_answer(content: str) -> dict:
    """Return an assistant's message."""
    return {"role": "assistant", "content": content}


def _probe_variants(message: dict) -> Iterator[tuple[dict, str]]:
    """Yield (a variant of an assistant's message with PROBE in it, the text that PROBE replaces).

    The likeliest variant comes first.
    """
    calls = message.get("tool_calls")
    if calls:
        function = calls[-1].get("function")
        probed = calls[-1] | ({"function": function | {"name": PROBE}} if function else {"name": PROBE})
        yield message | {"tool_calls": [*calls[:-1], probed]}, (function or calls[-1]).get("name", "")
    yield make_answer(PROBE), ""
    yield message | {"content": PROBE}, ""


def split_at_probe(
    apply: ApplyTemplate, messages: list[dict], replaced_text: str = ""
) -> tuple[str, str] | None:
    """Return (the text before PROBE, the text after it); None if the template does not show PROBE.

    replaced_text: what PROBE stands for in the messages. After the first PROBE it is put back.
    """
    head, found, tail = (try_apply(apply, messages) or "").partition(PROBE)
    return (head, tail.replace(PROBE, replaced_text) if replaced_text else tail) if found else None


def common_prefix_length(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def try_apply(apply: ApplyTemplate, messages: list[dict], **options) -> str | None:
    """Return apply(messages, **options); None if that raises one of TEMPLATE_ERRORS.

    A template may refuse a part of a conversation that it takes as a whole.
    """
    try:
        return apply(messages, **options)
    except TEMPLATE_ERRORS:
        return None
