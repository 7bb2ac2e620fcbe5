"""Messages and tools of a conversation, checked and brought into one form before a chat template sees
them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from options.errors import UserError
from options.exact_json import parse_json

# A message's reasoning, by the names that data and templates have for it (Qwen3's, gpt-oss's, OpenRouter's).
REASONING = ("reasoning_content", "thinking", "reasoning")
FLAGS = ("train", "weight")  # whether a message is learned: TRL's and axolotl's name, and OpenAI's
FORM = "messages must be a list of objects with a role and a content, both texts"


def checked_messages(messages: Any, where: str) -> list[dict]:
    """Returns the messages of a row without keys that hold nothing, as transformers gives them to templates.
    A message that must not be learned gets `train: False`. Raises UserError for unusable ones."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {FORM}")
    return [_checked_message(message, where) for message in messages]


def _checked_message(message: Any, where: str) -> dict:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(f"{where}: {FORM}")
    made = {key: value for key, value in message.items() if value is not None and key not in FLAGS}
    if not all(_flag(message, name, where) for name in FLAGS):
        made["train"] = False
    thought = next((made[name] for name in REASONING if name in made), None)
    if thought is not None and not isinstance(thought, str):
        raise UserError(f"{where}: a message's reasoning must be a text")
    assistant = made["role"] == "assistant"
    if assistant and thought is not None:
        made |= {name: thought for name in REASONING if name not in made}
    if "tool_calls" in made:
        made["tool_calls"] = _checked_calls(made["tool_calls"], where)
    if assistant and "content" not in made and not made.get("tool_calls") and thought is None:
        made["content"] = ""  # an answer of nothing
    if not isinstance(made.get("content", "" if assistant else None), str):
        raise UserError(f"{where}: {FORM}")
    return made


def _flag(message: Mapping, name: str, where: str) -> bool:
    """Whether the message is learned as far as this flag says."""
    value = message.get(name)
    if value is not None and value not in (0, 1):
        raise UserError(f"{where}: {name} of a message is {value!r}; expected true or false, 1 or 0")
    return value is None or bool(value)


def _checked_calls(calls: Any, where: str) -> list[dict]:
    calls = _from_json(calls)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{where}: tool_calls must be a list of objects")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping):
            raise UserError(f"{where}: the function of a tool call must be an object")
        if not isinstance(_from_json(function.get("arguments", {})), Mapping):
            raise UserError(f"{where}: arguments of a tool call must be an object, or the JSON text of one")
    _check_numbers(calls, where)
    return [dict(call) for call in calls]


def checked_tools(tools: Any, where: str) -> list[dict] | None:
    """A row's tools: a list of objects, or JSON text of it. None for an empty one: templates ask whether
    there are tools by different tests, and an empty list passes some. Raises UserError for unusable ones."""
    tools = _from_json(tools) if tools else None
    tools = [_from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise UserError(f"{where}: tools must be a list of objects, or the JSON text of one")
    _check_numbers(tools, where)
    return [dict(tool) for tool in tools] if tools else None


def _check_numbers(value: Any, where: str) -> None:
    """Raises UserError for NaN and infinity, which tables can hold and JSON cannot."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: a tool or its call holds {value} as a number, which JSON has not")
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for part in parts:
        _check_numbers(part, where)


def plain(messages: list[dict]) -> list[dict]:
    """Returns the messages without `train`, for a template."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def with_arguments(messages: list[dict], takes_objects: bool, takes_text: bool) -> list[dict]:
    """Returns the messages with the arguments of tool calls as they are where a template takes them so, else
    as objects or as JSON text. A call without arguments gets none: {}."""

    def fitted(call: dict) -> dict:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and not takes_text:
            arguments = _from_json(arguments)
        elif not isinstance(arguments, str) and not takes_objects:
            arguments = json.dumps(arguments, ensure_ascii=False)
        made = dict(function) | {"arguments": arguments}
        return call | {"function": made} if "function" in call else made

    return [
        message | {"tool_calls": [fitted(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _from_json(value: Any) -> Any:
    """What a JSON text says; a value that is none as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError):
        return value
