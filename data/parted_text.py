"""Contents of messages that have parts, texts and images, and the form that a chat template takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from data.chat_turns import HELLO, OPENINGS, PROBE, ApplyTemplate, try_apply


class PartedText(str):
    """The text of a message whose content is a list of parts. As a text it is its texts, joined.

    Attributes:
        parts: a text, or None for an image, for each part.
    """

    parts: tuple[str | None, ...]

    def __new__(cls, parts: Sequence[str | None]) -> PartedText:
        """Return the text of some parts."""
        text = super().__new__(cls, "".join(part for part in parts if part is not None))
        text.parts = tuple(parts)
        return text

    def as_content(self) -> list[dict]:
        """Return the parts as chat templates take them."""
        return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in self.parts]

    def write(self, placeholder: str) -> str:
        """Return the texts joined, with a text in the place of each image."""
        return "".join(placeholder if part is None else part for part in self.parts)


class ContentForm(NamedTuple):
    """The form in which a template can show the content of a message.

    Attributes:
        takes_texts: it may be a text.
        takes_parts: it may be a list of parts, of which the template shows an image as the placeholder.
    """

    takes_texts: bool
    takes_parts: bool


def find_content_form(apply: ApplyTemplate, placeholder: str) -> ContentForm:
    """Return the form of contents that a template takes, found out on a question of either form.

    A template that shows neither gets texts, since most take them.

    Args:
        apply: renders messages without changing them.
        placeholder: the text that stands for an image; "" = there are no images.
    """
    parts = [{"type": "image"}] * bool(placeholder) + [{"type": "text", "text": PROBE}]
    for opening in OPENINGS:
        as_text, as_parts = (
            try_apply(apply, [*opening[:-1], HELLO | {"content": content}]) or ""
            for content in (PROBE, parts)
        )
        shows_parts = PROBE in as_parts and placeholder in as_parts and "'type'" not in as_parts
        if PROBE in as_text or shows_parts:
            return ContentForm(PROBE in as_text, shows_parts)
    return ContentForm(takes_texts=True, takes_parts=False)


def fit_contents(messages: list[dict], form: ContentForm, placeholder: str) -> list[dict]:
    """Return the messages with their contents in the form that a template takes.

    placeholder: stands for an image in a text.
    """
    fitted = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, PartedText):
            whole = content.as_content() if form.takes_parts else content.write(placeholder)
            message = message | {"content": whole}
        elif isinstance(content, str) and not form.takes_texts:
            message = message | {"content": PartedText([content]).as_content()}
        fitted.append(message)
    return fitted
