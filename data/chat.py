"""The `chat` format: conversations through the tokenizer's chat template, and which parts of the text are
learned.

Each assistant turn is learned, from where the template's generation prompt ends to the token that closes the
turn. Templates with `{% generation %}` markers say it themselves; in all others data/chat_turns.py locates
the turns.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from data.chat_turns import (
    PROBE,
    TEMPLATE_ERRORS,
    Closings,
    Span,
    Turns,
    answer,
    attempt,
    common_length,
    find_closings,
)
from data.messages import plain, with_arguments
from data.template_date import with_day
from options.errors import UserError

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
HELLO = {"role": "user", "content": "Hi"}


class CallForm(NamedTuple):
    """The form in which a template can show tool calls.

    takes_objects: arguments may be objects, which transformers asks for.
    takes_text: arguments may be JSON text, which is shown as it is.
    needs_content: a call without content is shown as one with an empty content.
    shown: the text of one, "" if the template shows none.
    """

    takes_objects: bool
    takes_text: bool
    needs_content: bool
    shown: str


class Shown(NamedTuple):
    """A rendered conversation: its text, the learned ranges of its characters, and which of them the last
    answer begins with."""

    text: str
    learned: list[Span]
    last: int = -1


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

    def render(self, messages: list[dict], tools: list[dict] | None = None) -> Shown:
        """Renders a conversation. messages, tools: as data/messages.py makes them.

        Raises ValueError, or what the template raises, if it does not show what is to be learned.
        """
        wanted = [m["role"] == "assistant" and m.get("train", True) for m in messages]
        messages, show = self.fitted(messages), partial(self.show, tools=tools)
        special = self.tokenizer.bos_token, self.tokenizer.eos_token
        turns = Turns(messages, show(messages), show, self.closings, special)
        taught = [i for i, learned in enumerate(wanted) if learned and not turns.shows_nothing(i)]
        if MARKERS.search(self._template(tools)):
            return self._marked(turns, tools, taught)
        spans: list[Span] = []
        for i in taught:
            start, end = turns.span(i)
            # A line break behind the turn is the template's.
            end = start + len(turns.text[start:end].rstrip())
            if start >= end:
                raise ValueError("the chat template does not show the assistant's text")
            if spans and start < spans[-1][1]:
                raise ValueError("the chat template does not keep the assistant's turns apart")
            spans.append((start, end))
        return Shown(turns.text, spans)

    def _marked(self, turns: Turns, tools: list[dict] | None, taught: Sequence[int]) -> Shown:
        """Learned are the spans of the template's generation markers, but for those of turns that are not
        `taught`."""
        rendered: Any = render_jinja_template(  # annotated as a text
            conversations=[turns.messages],
            tools=[*tools] if tools else None,
            chat_template=self._template(tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (shown,), (spans,) = rendered
        if shown != turns.text:
            raise ValueError("the chat template shows a conversation otherwise each time")
        answers = [i for i, message in enumerate(turns.messages) if message["role"] == "assistant"]
        left_out = [turns.span(i) for i in answers if i not in taught]
        learned = [span for span in spans if span[0] < span[1] and not _meets(span, left_out)]
        last = -1
        if taught and len(spans) > len(answers):  # several for a turn, such as a thought and an answer
            turn = turns.span(taught[-1])
            last = next((i for i, span in enumerate(learned) if _meets(span, [turn])), last)
        return Shown(turns.text, learned, last)

    def prompt(self, given: list[dict], tools: list[dict] | None = None) -> str:
        """Renders the prompt for the next answer. It ends with the generation prompt, or earlier if the
        template never puts an answer behind all of that (DeepSeek R1's opens a thought). Raises ValueError if
        there is nothing to answer."""
        messages, show = self.fitted(given), partial(self.show, tools=tools)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError("there is no message to be answered")
        wanted = show(messages, add_generation_prompt=True)
        head, _, _ = show([*messages, answer(PROBE)]).partition(PROBE)
        return wanted if head.startswith(wanted) else head[: common_length(head, wanted)]

    def fitted(self, messages: list[dict]) -> list[dict]:
        """Copies of messages with tool-call arguments, and missing content, in the form that the template
        needs."""
        form = self._call_form
        made = with_arguments(plain(messages), form.takes_objects, form.takes_text)
        return [{"content": ""} | m for m in made] if form.needs_content else made

    def stops(self) -> list[int]:
        """Ids of the tokens that close an answer or a tool call, as far as these are tokens of their own."""
        added = {token: self.tokenizer.convert_tokens_to_ids(token) for token in self.closings.tokens}
        closing = self.closings.last.lstrip() or self.closings.between.lstrip()
        stops = [token for token in added if closing.startswith(token)]
        call = self._call_form.shown.rpartition("}")[2].rstrip()
        if not any(token in call for token in stops):  # gpt-oss closes calls by a token of their own
            stops += [token for token in added if call.endswith(token)]
        return sorted({added[token] for token in stops})

    @cached_property
    def closings(self) -> Closings:
        """What the template writes behind messages."""
        added = tuple(map(str, self.tokenizer.added_tokens_decoder.values()))
        split = getattr(
            self.tokenizer, "split_special_tokens", False
        )  # into letters, wherever they are written
        return find_closings(self.show, () if split else added)

    @cached_property
    def marker(self) -> str | None:
        """The text that closes an answer, where the tokenizer has no token for it; None where it has, or
        nothing does."""
        text = self.closings.last.strip() or self.closings.between.strip()
        return text if text and not text.startswith(self.closings.tokens) else None

    @cached_property
    def _call_form(self) -> CallForm:
        """Found out on a conversation with a call: without content if the template takes that, else with an
        empty one."""
        for content in ({}, {"content": ""}):
            objects, text = self._show_call({"x": "1"}, content), self._show_call('{"x": "1"}', content)
            takes_objects = bool(objects) and "{'x'" not in objects  # Python's form of an object is no JSON
            takes_text = '{"x": "1"}' in text
            if takes_objects or takes_text:
                return CallForm(takes_objects, takes_text, bool(content), objects if takes_objects else text)
        return CallForm(True, False, False, "")

    def _show_call(self, arguments: dict | str, content: dict) -> str:
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return attempt(self.show, [HELLO, {"role": "assistant", "tool_calls": [call]} | content]) or ""

    def _template(self, tools: list[dict] | None) -> str:
        if bool(tools) not in self._templates:
            self._templates[bool(tools)] = with_day(self.tokenizer.get_chat_template(tools=tools), self.day)
        return self._templates[bool(tools)]


def _meets(span: Span, others: list[Span]) -> bool:
    """Whether a range has a character in common with any of the others."""
    return any(span[0] < stop and begin < span[1] for begin, stop in others)


@contextlib.contextmanager
def template_errors(where: str) -> Iterator[None]:
    """Raises UserError for what a chat template raises within. where: the row or prompt, for the message."""
    try:
        yield
    except TEMPLATE_ERRORS as e:
        text = str(e).strip().splitlines()
        if text and "chat_template" in text[0]:
            reason = "the tokenizer has no chat template; use an instruct model, or rows of another format"
        else:
            reason = text[0] if text else type(e).__name__
        raise UserError(f"{where}: {reason}") from None
