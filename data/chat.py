"""The `chat` format: render conversations by the tokenizer's chat template, and find the learned parts.

Each assistant turn is learned, from the end of the template's generation prompt to the token that ends the
turn. Templates with `{% generation %}` markers say which parts these are; in all others data/chat_turns.py
locates the turns.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from data.answers import LAST_EMPTY_THOUGHT, OPEN_THOUGHT, skip_empty_thought
from data.chat_turns import (
    HELLO,
    OPENINGS,
    PROBE,
    TEMPLATE_ERRORS,
    Span,
    TurnEndings,
    Turns,
    common_prefix_length,
    find_endings,
    make_answer,
    split_at_probe,
)
from data.messages import convert_arguments, drop_train_flags
from data.parted_text import ContentForm, find_content_form, fit_contents
from data.template_date import set_template_date
from data.tool_calls import ToolCallForm, find_tool_call_form
from options.errors import UserError

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class RenderedChat(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: of the conversation.
        learned: ranges of the characters that are learned.
        last_answer_index: index of the learned range that the last answer begins with.
        has_empty_thought: whether the template's empty thought is before a learned range, and not part of it.
    """

    text: str
    learned: list[Span]
    last_answer_index: int = -1
    has_empty_thought: bool = False


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: transformers' tokenizer. If it has no chat template, the methods raise ValueError.
        day: YYYY-MM-DD, the date for templates that write today's; None = today.
        empty_thinking: --empty_thinking. With "learn", the template's empty thought before an answer is
            learned; with "prompt", prompts end with it.
        placeholder: the text that stands for an image; "" = there are no images.
    """

    def __init__(
        self, tokenizer: Any, day: str | None = None, empty_thinking: str = "auto", placeholder: str = ""
    ):
        self.tokenizer, self.day, self.empty_thinking = tokenizer, day, empty_thinking
        self.placeholder = placeholder
        self._templates: dict[bool, str] = {}  # by whether there are tools, which may have their own

    def apply(
        self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of a conversation, as transformers renders it. Raises one of TEMPLATE_ERRORS."""
        return self._apply_unchanged(self._fit_contents(messages), tools, add_generation_prompt)

    def _apply_unchanged(
        self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Return what `apply` does for messages whose contents are in a form that the template takes."""
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self._get_template(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def render(self, messages: list[dict], tools: list[dict] | None = None) -> RenderedChat:
        """Return the text of a conversation, and the character ranges of its turns that are learned.

        messages, tools: from `check_messages` and `check_tools`. Raises one of TEMPLATE_ERRORS if the
        template fails, or ValueError if it does not show a turn that is to be learned.
        """
        is_learned = [m["role"] == "assistant" and m.get("train", True) for m in messages]
        messages, apply = self.fit_messages(messages), partial(self.apply, tools=tools)
        special_texts = self.tokenizer.bos_token, self.tokenizer.eos_token
        turns = Turns(messages, apply(messages), apply, self.endings, special_texts)
        learned_turns = [i for i, learned in enumerate(is_learned) if learned and not turns.is_empty_turn(i)]
        if GENERATION_MARKER.search(self._get_template(tools)):
            return self._render_marked(turns, tools, learned_turns)
        spans: list[Span] = []
        for i in learned_turns:
            start, end = turns.find_span(i)
            # A line break after the turn is the template's.
            end = start + len(turns.text[start:end].rstrip())
            if start >= end:
                raise ValueError("the chat template does not show the assistant's text")
            if spans and start < spans[-1][1]:
                raise ValueError("the chat template does not separate the assistant's turns")
            spans.append((start, end))
        learned = self._skip_empty_thoughts(turns.text, spans)
        return RenderedChat(turns.text, learned, has_empty_thought=learned != spans)

    def _render_marked(
        self, turns: Turns, tools: list[dict] | None, learned_turns: Sequence[int]
    ) -> RenderedChat:
        """Return the text with the spans between the template's generation markers as the learned ranges.

        Spans of turns that are not among `learned_turns` are left out. Raises one of TEMPLATE_ERRORS.
        """
        rendered: Any = render_jinja_template(  # transformers annotates it as a text
            conversations=[self._fit_contents(turns.messages)],
            tools=[*tools] if tools else None,
            chat_template=self._get_template(tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (text,), (spans,) = rendered
        if text != turns.text:
            raise ValueError("the chat template renders the same conversation differently each time")
        answers = [i for i, message in enumerate(turns.messages) if message["role"] == "assistant"]
        unlearned = [turns.find_span(i) for i in answers if i not in learned_turns]
        marked = [span for span in spans if span[0] < span[1] and not _overlaps(span, unlearned)]
        learned = self._skip_empty_thoughts(text, marked)
        last_answer_index = -1
        if learned_turns and len(spans) > len(answers):  # several in a turn: a thought and an answer
            turn = turns.find_span(learned_turns[-1])
            overlapping = (i for i, span in enumerate(learned) if _overlaps(span, [turn]))
            last_answer_index = next(overlapping, last_answer_index)
        return RenderedChat(turns.text, learned, last_answer_index, has_empty_thought=learned != marked)

    def _skip_empty_thoughts(self, text: str, spans: list[Span]) -> list[Span]:
        """Return the spans without the template's empty thought at their beginning, unless it is learned.

        Any other empty thought is text of the answer, since no prompt can end with it.
        """
        if self.empty_thinking == "learn" or not self.empty_thought:
            return spans
        answers = ((self._skip_empty_thought(text, start, end), end) for start, end in spans)
        return [(start, end) for start, end in answers if start < end]

    def _skip_empty_thought(self, text: str, start: int, end: int) -> int:
        """Return where an answer begins behind the template's empty thought; `start` without that thought."""
        behind = skip_empty_thought(text, start, end)
        opened = text.rfind(OPEN_THOUGHT, 0, behind)
        if behind == start or not text.startswith(self.empty_thought, opened):
            return start
        return opened + len(self.empty_thought)

    def render_prompt(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        """Return the text that asks for the last answer; the assistant's messages at the end are left out.

        It ends with the generation prompt, or earlier if the template never writes an answer after all of
        that (DeepSeek R1's opens a thought). With `empty_thinking` "prompt" it ends with the empty thought
        that the template writes before an answer, as enable_thinking=False asks Qwen3's template for it. With
        "learn" it ends where that thought differs from the generation prompt, if that opens another one.
        Raises ValueError if there is no message to answer, else one of TEMPLATE_ERRORS if the template fails.
        """
        messages, apply = self.fit_messages(messages), partial(self.apply, tools=tools)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError("there is no message to be answered")
        prompt = apply(messages, add_generation_prompt=True)
        head, _, _ = apply([*messages, make_answer(PROBE)]).partition(PROBE)
        common = common_prefix_length(head, prompt)
        if not common < skip_empty_thought(head, common) == len(head):  # no empty thought follows
            return head[:common]
        # Nemotron 3's generation prompt ends with "<think>\n", and its empty thought is "<think></think>".
        return {"prompt": head, "learn": head[:common], "auto": prompt}[self.empty_thinking]

    def shows_empty_thought(self) -> bool:
        """Return whether prompts with and without an empty thought differ."""
        variants = [ChatTemplate(self.tokenizer, self.day, choice) for choice in ("prompt", "learn")]
        for opening in OPENINGS:
            with contextlib.suppress(*TEMPLATE_ERRORS):
                with_thought, without = (chat.render_prompt(opening) for chat in variants)
                return with_thought != without
        return False

    def check_system(self) -> None:
        """Raise UserError unless the template shows a system prompt before a question."""
        system = {"role": "system", "content": PROBE}
        try:
            text = self.apply([system, HELLO], add_generation_prompt=True)
        except TEMPLATE_ERRORS as e:
            reason = " ".join(str(e).split())
            raise UserError(f"the chat template takes no system prompt ({reason})") from None
        if PROBE not in text:
            raise UserError("the chat template does not show a system prompt")

    def fit_messages(self, messages: list[dict]) -> list[dict]:
        """Return the messages without train flags, with tool calls in the form that the template needs."""
        form = self._tool_call_form
        fitted = convert_arguments(drop_train_flags(messages), form.takes_objects, form.takes_text)
        return [{"content": ""} | m for m in fitted] if form.needs_content else fitted

    def _fit_contents(self, messages: list[dict]) -> list[dict]:
        """Return the messages with their contents as texts or lists of parts, as the template takes them."""
        return fit_contents(messages, self._content_form, self.placeholder)

    def find_stop_ids(self) -> list[int]:
        """Return the ids of the tokens that end an answer or a tool call.

        There are none if the template ends them with texts that are no added tokens.
        """
        added = {token: self.tokenizer.convert_tokens_to_ids(token) for token in self.endings.added_tokens}
        ending = self.endings.after_answer.lstrip() or self.endings.between_turns.lstrip()
        stops = [token for token in added if ending.startswith(token)]
        call_ending = self._tool_call_form.example.rpartition("}")[2].rstrip()
        if not any(token in call_ending for token in stops):  # gpt-oss ends calls by their own token
            stops += [token for token in added if call_ending.endswith(token)]
        return sorted({added[token] for token in stops})

    def ending_tokens(self) -> list[str]:
        """Return the tokens of `find_stop_ids`, and EOS if the tokenizer has one."""
        tokens = self.tokenizer.convert_ids_to_tokens(self.find_stop_ids())
        return [token for token in (*tokens, self.tokenizer.eos_token) if token]

    @cached_property
    def empty_thought(self) -> str:
        """The empty thought that the template writes before an answer without one; "" if it writes none."""
        for opening in OPENINGS:
            split = split_at_probe(self.apply, [*opening, make_answer(PROBE)])
            if split is not None:
                thought = LAST_EMPTY_THOUGHT.search(split[0])
                return thought[0] if thought else ""
        return ""

    @cached_property
    def endings(self) -> TurnEndings:
        """The texts that the template writes after messages."""
        added_tokens = tuple(map(str, self.tokenizer.added_tokens_decoder.values()))
        # Such a tokenizer splits added tokens into letters wherever a text has them.
        splits_tokens = getattr(self.tokenizer, "split_special_tokens", False)
        return find_endings(self.apply, () if splits_tokens else added_tokens)

    @cached_property
    def marker(self) -> str | None:
        """The text that ends an answer; None if the tokenizer has a token for it, or no text ends answers."""
        text = self.endings.after_answer.strip() or self.endings.between_turns.strip()
        return text if text and not text.startswith(self.endings.added_tokens) else None

    @cached_property
    def _content_form(self) -> ContentForm:
        """The form of contents that the template takes."""
        return find_content_form(self._apply_unchanged, self.placeholder)

    @cached_property
    def _tool_call_form(self) -> ToolCallForm:
        """The form of tool calls that the template takes."""
        return find_tool_call_form(self.apply)

    def _get_template(self, tools: list[dict] | None) -> str:
        """Return the template for conversations with or without tools, with `self.day` as its date."""
        if bool(tools) not in self._templates:
            template = self.tokenizer.get_chat_template(tools=tools)
            self._templates[bool(tools)] = set_template_date(template, self.day)
        return self._templates[bool(tools)]


def _overlaps(span: Span, others: list[Span]) -> bool:
    """Return whether a range has a character in common with any of the others."""
    return any(span[0] < end and start < span[1] for start, end in others)


@contextlib.contextmanager
def convert_template_errors(error_prefix: str) -> Iterator[None]:
    """Within the context, turn TEMPLATE_ERRORS into UserErrors. error_prefix: names the row or prompt."""
    try:
        yield
    except TEMPLATE_ERRORS as e:
        text = str(e).strip().splitlines()
        if text and "chat_template" in text[0]:
            reason = (
                "the tokenizer has no chat template; --chat_template gives it one (docs/data.md), or use an"
                " instruct model"
            )
        else:
            reason = text[0] if text else type(e).__name__
        raise UserError(f"{error_prefix}: {reason}") from None
