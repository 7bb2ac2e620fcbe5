"""What a chat template is given and does not show: found out on some messages of the data, told in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from data.chat import ChatTemplate
from data.chat_turns import PROBE, TEMPLATE_ERRORS
from data.messages import FLAGS, REASONING, checked_messages, checked_tools
from options.errors import listed

LOOKED_AT = 40  # messages of each kind
THOUGHT = "</think>"


def unshown(chat: ChatTemplate, rows: Iterable[dict]) -> list[str]:
    """Lines to tell at start: which parts of these rows the template leaves out, and which flags have no effect.
    rows: as they were read, each of which it can show."""
    seen: Counter[str] = Counter()
    hidden: Counter[str] = Counter()
    flagged = 0
    for row in rows:
        new = {part for part in _parts(row) if seen[part[0]] < LOOKED_AT}
        flagged += any(m.get(flag) and m["role"] != "assistant" for m in row["messages"] for flag in FLAGS)
        if not new:
            continue
        messages = chat.fitted(checked_messages(row["messages"], ""))
        tools = checked_tools(row.get("tools"), "")
        text = chat.show(messages, tools)
        for label, i, key in sorted(new, key=str):
            if seen[label] < LOOKED_AT:
                seen[label] += 1
                hidden[label] += _is_hidden(chat, messages, tools, text, i, key)
    return _told(seen, hidden) + _told_flags(flagged)


def _parts(row: dict) -> Iterator[tuple[str, int | None, str]]:
    """(what it is called, the message, the key) of each part that a template may show."""
    if row.get("tools"):
        yield "tools", None, "tools"
    for i, message in enumerate(row["messages"]):
        for key, value in message.items():
            if value is None or value == "" or key in ("role", *FLAGS):
                continue
            if key == "content":
                yield f"what role {message['role']} says", i, key
                if message["role"] == "assistant" and THOUGHT in value:
                    yield "<think> in content", i, THOUGHT
            else:
                yield key, i, key


def _is_hidden(
    chat: ChatTemplate, messages: list[dict], tools: list[dict] | None, text: str, i: int | None, key: str
) -> bool:
    """Whether the text is the same without a part, or does not hold what is put in its place."""
    if i is None:
        changed, others = messages, None
    else:
        changed, others = [*messages[:i], _without(messages[i], key), *messages[i + 1 :]], tools
    try:
        shown = chat.show(changed, others)
    except TEMPLATE_ERRORS:  # it needs this part
        return False
    return PROBE not in shown if key == "content" else shown == text


def _without(message: dict, key: str) -> dict[str, Any]:
    if key == "content":
        return message | {"content": PROBE}
    if key == THOUGHT:
        return message | {"content": message["content"].rpartition(THOUGHT)[2].lstrip("\n")}
    keys = REASONING if key in REASONING else (key,)
    return {name: value for name, value in message.items() if name not in keys}


def _told(seen: Counter[str], hidden: Counter[str]) -> list[str]:
    never = [label for label in seen if hidden[label] == seen[label]]
    partly = [
        f"{label} in {hidden[label]} of {seen[label]} messages looked at"
        for label in seen
        if 0 < hidden[label] < seen[label]
    ]
    left_out = listed(sorted(never) + sorted(partly))
    return [f"data: the chat template does not show {left_out}"] if left_out else []


def _told_flags(flagged: int) -> list[str]:
    if not flagged:
        return []
    names = " or ".join(FLAGS)
    return [
        f"data: {flagged:,} rows set {names} for other roles than the assistant, whose turns alone are learned"
    ]
