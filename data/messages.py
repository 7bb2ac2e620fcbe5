"""Check the messages and tools of a conversation, and bring them into one form for chat templates."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from options.errors import UserError, join_names
from options.exact_json import describe_json_type, try_parse_json

# Names that data and templates have for a message's reasoning: Qwen3's, gpt-oss's, OpenRouter's.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Keys that say whether a message is learned: TRL's and axolotl's, and OpenAI's.
FLAGS = ("train", "weight")
EXPECTED = "messages must be a list of objects with a role and a content, both texts (docs/data.md)"


def check_messages(messages: Any, error_prefix: str) -> list[dict]:
    """Return a row's messages, checked and in one form for chat templates. Raises UserError.

    Keys that are null are left out, a message that must not be learned gets `train: False` instead of FLAGS,
    reasoning is under each name of REASONING, tool calls are parsed, and an empty answer has the content "".
    """
    if not isinstance(messages, list):
        raise UserError(f"{error_prefix}: messages is {describe_json_type(messages)}; {EXPECTED}")
    if not messages:
        raise UserError(f"{error_prefix}: messages is empty; {EXPECTED}")
    return [_check_message(message, f"{error_prefix}: message {i}") for i, message in enumerate(messages, 1)]


def _check_message(message: Any, error_prefix: str) -> dict:
    """Return one message as `check_messages` does. Raises UserError if it is unusable."""
    if not isinstance(message, Mapping):
        raise UserError(f"{error_prefix} is {describe_json_type(message)}; {EXPECTED}")
    checked = {key: value for key, value in message.items() if value is not None and key not in FLAGS}
    if not isinstance(checked.get("role"), str):
        raise _wrong_key_error(checked, "role", error_prefix)
    if not all(_is_flag_set(message, flag, error_prefix) for flag in FLAGS):
        checked["train"] = False
    thought = next((checked[name] for name in REASONING if name in checked), None)
    if thought is not None and not isinstance(thought, str):
        raise UserError(f"{error_prefix}: a message's reasoning must be a text")
    is_assistant = checked["role"] == "assistant"
    if is_assistant and thought is not None:
        checked |= {name: thought for name in REASONING if name not in checked}
    if "tool_calls" in checked:
        checked["tool_calls"] = _check_tool_calls(checked["tool_calls"], error_prefix)
    if is_assistant and "content" not in checked and not checked.get("tool_calls") and thought is None:
        checked["content"] = ""  # an empty answer
    if not isinstance(checked.get("content", "" if is_assistant else None), str):
        raise _wrong_key_error(checked, "content", error_prefix)
    return checked


def _wrong_key_error(message: Mapping, key: str, error_prefix: str) -> UserError:
    """Return the error for a message whose role or content is missing or not a text."""
    if key not in message:
        keys = join_names([str(name) for name in message])
        return UserError(f"{error_prefix} has no {key}{f', only {keys}' if keys else ''}; {EXPECTED}")
    value, remedy = message[key], ""
    if key == "content" and isinstance(value, list):
        remedy = " (join the texts of its parts)"
    elif key == "content" and isinstance(value, Mapping):
        remedy = " (write it as JSON text)"
    return UserError(f"{error_prefix}: its {key} is {describe_json_type(value)}{remedy}; {EXPECTED}")


def _is_flag_set(message: Mapping, flag: str, error_prefix: str) -> bool:
    """Return whether a flag lets the message be learned; True without the flag. Raises UserError."""
    value = message.get(flag)
    if value is not None and value not in (0, 1):
        raise UserError(f"{error_prefix}: {flag} of a message is {value!r}; expected true or false, 1 or 0")
    return value is None or bool(value)


def _check_tool_calls(calls: Any, error_prefix: str) -> list[dict]:
    """Return the tool calls of a message, parsed if they are JSON text. Raises UserError if unusable."""
    calls = try_parse_json(calls)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{error_prefix}: tool_calls must be a list of objects")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping):
            raise UserError(f"{error_prefix}: the function of a tool call must be an object")
        if not isinstance(try_parse_json(function.get("arguments", {})), Mapping):
            raise UserError(
                f"{error_prefix}: arguments of a tool call must be an object, or the JSON text of one"
            )
    _check_numbers(calls, error_prefix)
    return [dict(call) for call in calls]


def check_tools(tools: Any, error_prefix: str) -> list[dict] | None:
    """Return the tools of a row, which are a list of objects or its JSON text; None if it has none.

    An empty list becomes None: templates test for tools in different ways, and an empty list passes some.
    Raises UserError for unusable ones.
    """
    tools = try_parse_json(tools) if tools else None
    tools = [try_parse_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise UserError(f"{error_prefix}: tools must be a list of objects, or the JSON text of one")
    _check_numbers(tools, error_prefix)
    return [dict(tool) for tool in tools] if tools else None


def _check_numbers(value: Any, error_prefix: str) -> None:
    """Raise UserError for NaN and infinity at any depth: tables can hold them and JSON cannot."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{error_prefix}: a tool or its call holds the number {value}, which JSON cannot express"
        )
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for part in parts:
        _check_numbers(part, error_prefix)


def replace_system(messages: list[dict], text: str) -> list[dict]:
    """Return the messages with `text` as the system prompt, in place of one at their beginning."""
    has_own = messages[:1] and messages[0]["role"] in ("system", "developer")
    return [{"role": "system", "content": text}, *messages[bool(has_own) :]]


def drop_train_flags(messages: list[dict]) -> list[dict]:
    """Return the messages without `train`, for a template."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def convert_arguments(messages: list[dict], takes_objects: bool, takes_text: bool) -> list[dict]:
    """Return the messages with the arguments of their tool calls in a form that the template takes.

    Arguments stay as they are if the template takes them so; else they become objects or JSON text. A call
    without arguments gets {}.
    """

    def convert_call(call: dict) -> dict:
        """Return one tool call with its arguments converted."""
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and not takes_text:
            arguments = try_parse_json(arguments)
        elif not isinstance(arguments, str) and not takes_objects:
            arguments = json.dumps(arguments, ensure_ascii=False)
        converted = dict(function) | {"arguments": arguments}
        return call | {"function": converted} if "function" in call else converted

    return [
        message | {"tool_calls": [convert_call(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]
