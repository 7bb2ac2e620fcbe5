"""The form in which a chat template takes tool calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from data.chat_turns import HELLO, try_apply


class ToolCallForm(NamedTuple):
    """The form in which a template can show tool calls.

    Attributes:
        takes_objects: arguments may be objects, which transformers asks for.
        takes_text: arguments may be JSON text, which is shown unchanged.
        needs_content: a message with a call must have a content, which may be empty.
        example: the text that the template writes of a call; "" if it writes none.
    """

    takes_objects: bool
    takes_text: bool
    needs_content: bool
    example: str


def find_tool_call_form(apply: Callable[..., str]) -> ToolCallForm:
    """Return the form of tool calls that a template takes, found out on a conversation with a call.

    The call has no content if the template takes that, else an empty one. apply(messages) renders a
    conversation.
    """
    for content in ({}, {"content": ""}):
        objects = _apply_to_call(apply, {"x": "1"}, content)
        text = _apply_to_call(apply, '{"x": "1"}', content)
        takes_objects = bool(objects) and "{'x'" not in objects  # Python's form of an object is not JSON
        takes_text = '{"x": "1"}' in text
        if takes_objects or takes_text:
            example = objects if takes_objects else text
            return ToolCallForm(takes_objects, takes_text, bool(content), example)
    return ToolCallForm(True, False, False, "")


def _apply_to_call(apply: Callable[..., str], arguments: dict | str, content: dict) -> str:
    """Return the text of a conversation with a tool call; "" if the template refuses it.

    content: {} or {"content": text}, of the message with the call.
    """
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return try_apply(apply, [HELLO, {"role": "assistant", "tool_calls": [call]} | content]) or ""
