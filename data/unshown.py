"""What a chat template is given and does not show, or does not close: found out on a sample of the data, told
at start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from data.chat import ChatTemplate
from data.chat_turns import PROBE, TEMPLATE_ERRORS
from data.messages import FLAGS, REASONING, checked_messages, checked_tools
from options.errors import join_names

SAMPLE = 40  # messages of each kind that are looked at, spread over the rows
THOUGHT = "</think>"
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
MORE_CALLS = "further tool_calls"
Part = tuple[str, int | None]  # what it is called, and its message; None: of the row


def unshown(chat: ChatTemplate, rows: Sequence[dict]) -> list[str]:
    """Remarks on which parts of these rows the template leaves out, and which flags have no effect. rows: as
    they were read, each of which the template can show."""
    total = Counter(label for row in rows for label, _ in _parts(row))
    met: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    hidden: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for row in rows:
        chosen = []
        for label, i in _parts(row):
            if met[label] % -(-total[label] // SAMPLE) == 0:
                chosen.append((label, i))
            met[label] += 1
        if chosen:
            messages = chat.fitted(checked_messages(row["messages"], ""))
            tools = checked_tools(row.get("tools"), "")
            text = chat.show(messages, tools)
            seen.update(label for label, _ in chosen)
            hidden.update(part[0] for part in chosen if _is_hidden(chat, messages, tools, text, part))
            outside.update(_shown_outside(chat, messages, tools, chosen))
    return (
        _describe(seen, hidden)
        + _describe_outside(seen, outside)
        + _describe_flags(rows)
        + _describe_roles(rows)
    )


def _parts(row: dict) -> Iterator[Part]:
    """Each part of a row that a template may show. What templates treat differently has a name of its own."""
    if _holds(row.get("tools")):
        yield "tools", None
    messages = row["messages"]
    asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        calls = message.get("tool_calls")
        for key, value in message.items():
            if not _holds(value) or key in ("role", *FLAGS):
                continue
            if key == "content":
                yield f"what role {message['role']} says" + " beside tool_calls" * _holds(calls), i
                if message["role"] == "assistant" and THOUGHT in value:
                    yield "<think> in content" + _when(i, asked), i
            else:
                yield key + _when(i, asked) * (key in REASONING), i
        if isinstance(calls, list) and len(calls) > 1:
            yield MORE_CALLS, i


def _when(i: int, asked: int) -> str:
    return " of earlier turns" if i < asked else ""


def _holds(value: Any) -> bool:
    return value not in (None, "", [], {}, "[]", "null")


def _is_hidden(
    chat: ChatTemplate, messages: list[dict], tools: list[dict] | None, text: str, part: Part
) -> bool:
    """Whether the text is the same without a part, or does not hold what is put in its place."""
    label, i = part
    try:
        if i is None:
            return chat.show(messages, None) == text
        if label.startswith("what role"):
            return PROBE not in chat.show(_probed(messages, i, ("content",)), tools)
        keys = _keys(label)
        if all(isinstance(messages[i].get(key), str) for key in keys):
            return PROBE not in chat.show(_probed(messages, i, keys), tools)
        without = [[*messages[:i], message, *messages[i + 1 :]] for message in _without(messages[i], label)]
        return any(chat.show(changed, tools) == text for changed in without)
    except TEMPLATE_ERRORS:  # it needs this part
        return False


def _without(message: dict, label: str) -> list[dict]:
    """The message without a part; a thought in two ways, as templates keep the line breaks behind it or
    not."""
    if label.startswith("<think>"):
        rest = message["content"].rpartition(THOUGHT)[2]
        return [message | {"content": rest}, message | {"content": rest.lstrip("\n")}]
    if label == MORE_CALLS:
        return [message | {"tool_calls": message["tool_calls"][:1]}]
    return [{name: value for name, value in message.items() if name not in _keys(label)}]


def _keys(label: str) -> tuple[str, ...]:
    """The keys of a message that hold a part: a thought stands under each of its names."""
    key = label.removesuffix(" of earlier turns")
    return REASONING if key in REASONING else (key,)


def _probed(messages: list[dict], i: int, keys: tuple[str, ...]) -> list[dict]:
    return [*messages[:i], messages[i] | dict.fromkeys(keys, PROBE), *messages[i + 1 :]]


def _shown_outside(
    chat: ChatTemplate, messages: list[dict], tools: list[dict] | None, parts: Sequence[Part]
) -> list[str]:
    """Labels of what an assistant says, of these parts, that the template shows elsewhere than in its turn
    (Gemma 4: what is said beside calls stands behind their results), so that it is not learned. Rows that
    choose their turns by flags are left out."""
    said = [
        (label, i) for label, i in parts if i is not None and label.startswith("what role assistant says")
    ]
    if not said or any(flag in message for message in messages for flag in FLAGS):
        return []
    try:
        shown = chat.render(messages, tools)
    except TEMPLATE_ERRORS:
        return []
    learned = [shown.text[start:end] for start, end in shown.learned]
    labels = []
    for label, i in said:
        content = messages[i]["content"].strip()
        if content in shown.text and not any(content in text for text in learned):
            labels.append(label)
    return labels


def _describe(seen: Counter[str], hidden: Counter[str]) -> list[str]:
    never = sorted(label for label in seen if hidden[label] == seen[label])
    partly = [_counted(label, hidden, seen) for label in sorted(seen) if 0 < hidden[label] < seen[label]]
    left_out = ([join_names(never)] if never else []) + partly
    return [f"data: the chat template does not show {', '.join(left_out)}"] if left_out else []


def _describe_outside(seen: Counter[str], outside: Counter[str]) -> list[str]:
    found = ", ".join(_counted(label, outside, seen) for label in sorted(outside))
    return [f"data: shown outside of the assistant's turn, and not learned: {found}"] if found else []


def _counted(label: str, found: Counter[str], seen: Counter[str]) -> str:
    return f"{join_names([label])} in {found[label]} of {seen[label]} messages looked at"


def _describe_flags(rows: Sequence[dict]) -> list[str]:
    flagged = sum(
        any(m.get(flag) and m["role"] != "assistant" for m in row["messages"] for flag in FLAGS)
        for row in rows
    )
    if not flagged:
        return []
    names = " or ".join(FLAGS)
    return [
        f"data: {flagged:,} rows set {names} for other roles than the assistant, whose turns alone are learned"
    ]


def _describe_roles(rows: Sequence[dict]) -> list[str]:
    roles = Counter(m["role"] for row in rows for m in row["messages"] if m["role"] not in ROLES)
    if not roles:
        return []
    names = join_names([f"{role} ({count:,})" for role, count in roles.most_common()])
    return [f"data: messages of the roles {names} are not learned; only the role assistant is"]


def unclosed(chat: ChatTemplate, learned: Sequence[str]) -> list[str]:
    """A remark if answers are learned without what would end them. learned: the last learned range of each
    row."""
    tokenizer = chat.tokenizer
    endings = tuple(filter(None, [*tokenizer.convert_ids_to_tokens(chat.stops()), tokenizer.eos_token]))
    looked_at = learned[:: -(-len(learned) // SAMPLE) or 1]
    if chat.marker:
        return [
            f"data: the chat template ends answers with {chat.marker!r}, for which the tokenizer has no token: it is"
            " learned as letters"
        ]
    missing = sum(not text.rstrip().endswith(endings) for text in looked_at)
    if not missing:
        return []
    return [
        f"data: {missing} of {len(looked_at)} last answers looked at are learned without a token that ends them: the"
        " chat template shows none there, and the model is not taught to stop"
    ]
