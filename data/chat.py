"""The `chat` format: conversations through the tokenizer's chat template, and where their turns lie in the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from options.errors import UserError

PROBE = "\uf8ffprobe\uf8ff"  # stands for an answer; a private character, so in no template or text


class ChatTemplate:
    """A tokenizer's chat template. day: YYYY-MM-DD, what it gets for today's date; None = today."""

    def __init__(self, tokenizer: Any, day: str | None = None):
        self.tokenizer, self.day = tokenizer, day

    def show(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def render(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """(the text, the learned ranges of its characters)."""
        text, learned = self.show(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not message["content"].strip():
                continue
            start, end = self._turn(messages, i, text)
            end = start + len(text[start:end].rstrip())  # a line break behind the turn is the template's
            if start >= end:
                raise ValueError("the chat template does not show the assistant's text")
            learned.append((start, end))
        return text, learned

    def prompt(self, given: list[dict]) -> str:
        """What the template shows before the next answer, where training begins to learn: with its generation
        prompt, unless it shows no answer behind that (DeepSeek R1's opens a thought)."""
        messages, show = list(given), self.show
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError("there is no message to be answered")
        wanted = show(messages, add_generation_prompt=True)
        head, _, _ = show([*messages, {"role": "assistant", "content": PROBE}]).partition(PROBE)
        return wanted if head.startswith(wanted) else head[: _common(head, wanted)]

    def ending(self) -> str:
        """What the chat template writes behind the last answer of a conversation: "" if nothing."""
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROBE}]
        return self.show(messages).partition(PROBE)[2]

    def _turn(self, messages: list[dict], i: int, text: str) -> tuple[int, int]:
        """Where turn i lies in `text`, the template's text of all messages.

        It begins where the template, given the messages before it, asks for the answer, and ends where the text
        of the messages up to it ends. Templates may write an earlier turn otherwise than the last one (Qwen3
        drops old reasoning): then what stands in place of a probe is the turn, with what closes a last turn.
        """
        show = self.show
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


def checked_messages(messages, where: str) -> list[dict]:
    """The messages of a row, without keys that hold nothing. Raises UserError for unusable ones."""
    good = isinstance(messages, list) and bool(messages)
    for message in messages if good else []:
        good = good and isinstance(message, Mapping)
        good = good and all(isinstance(message.get(key), str) for key in ("role", "content"))
    if not good:
        raise UserError(f"{where}: messages must be a list of objects with a role and a content, both texts")
    # Tables give each message every key (tool_calls: None), which a template would take for given.
    return [{k: v for k, v in m.items() if v is not None} for m in messages]
