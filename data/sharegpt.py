"""ShareGPT's messages, with `from` and `value`, as messages with `role` and `content`.

Names of `from` are those of ShareGPT and of the data that programs such as FastChat, axolotl and
LLaMA-Factory read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from options.errors import UserError, join_names
from options.exact_json import describe_json_type, try_parse_json

# The role of each value of `from`, in lower case.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")  # values of `from`: the assistant's, whose `value` is a call as JSON
EXPECTED = "a message of ShareGPT has a from and a value, both texts (docs/data.md)"
EXPECTED_CALL = 'expected a call as JSON: {"name": "f", "arguments": {"x": 1}}, or a list of calls'


def rename_message_keys(messages: Any, error_prefix: str) -> Any:
    """Return messages with `role` and `content` in the place of `from` and `value`; other values unchanged.

    Messages that have a role stay as they are. Raises UserError for an unknown `from` or an unusable `value`.
    """
    if not isinstance(messages, list):
        return messages
    return [
        _rename_keys(message, f"{error_prefix}: message {i}")
        if isinstance(message, Mapping) and message.get("role") is None and "from" in message
        else message
        for i, message in enumerate(messages, 1)
    ]


def _rename_keys(message: Mapping, error_prefix: str) -> dict:
    """Return a message of ShareGPT with `role` and `content`, or with `tool_calls`. Raises UserError."""
    given = {key: value for key, value in message.items() if value is not None}
    name = _read_text(given, "from", error_prefix)
    if name.lower() not in (*ROLES, *CALLS):
        known = ", ".join((*ROLES, *CALLS))
        raise UserError(
            f"{error_prefix}: from is {join_names([name])}; known are {known}; another role is written as"
            " role and content (docs/data.md)"
        )
    more = {key: value for key, value in given.items() if key not in ("from", "value", "role")}
    is_call = name.lower() in CALLS
    role = "assistant" if is_call else ROLES[name.lower()]
    if "value" not in given and role == "assistant" and not is_call:
        return {"role": role} | more  # an empty answer, or one with keys of its own
    if is_call:
        return {"role": role, "tool_calls": _parse_calls(given.get("value"), error_prefix)} | more
    return {"role": role, "content": _read_text(given, "value", error_prefix)} | more


def _read_text(message: Mapping, key: str, error_prefix: str) -> str:
    """Return the text of `from` or `value`. Raises UserError if it is missing or not a text."""
    if key not in message:
        keys = join_names([str(name) for name in message])
        raise UserError(f"{error_prefix} has no {key}, only {keys}; {EXPECTED}")
    if not isinstance(message[key], str):
        raise UserError(f"{error_prefix}: its {key} is {describe_json_type(message[key])}; {EXPECTED}")
    return message[key]


def _parse_calls(value: Any, error_prefix: str) -> list[dict]:
    """Return the calls in the `value` of a function call, as `tool_calls` of a message. Raises UserError."""
    parsed = try_parse_json(value)
    calls = parsed if isinstance(parsed, list) else [parsed]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise UserError(f"{error_prefix}: its value is {describe_json_type(value)}; {EXPECTED_CALL}")
    return [{"type": "function", "function": dict(call)} for call in calls]
