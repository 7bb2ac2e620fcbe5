"""Remarks on what a chat template does not show of the data, or does not end with a token.

They are found out on a sample of the data, and printed at start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from data.answers import skip_empty_thought
from data.chat import ChatTemplate
from data.chat_turns import OPENINGS, PROBE, TEMPLATE_ERRORS
from data.messages import FLAGS, REASONING, check_messages, check_tools
from options.errors import join_names

T = TypeVar("T")
SAMPLE_SIZE = 40  # messages of each kind, or rows, that are examined, spread over the rows
THOUGHT_END = "</think>"
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
MORE_CALLS = "further tool_calls"
TOOL_PROBE = "zqx_probe_xqz"  # ASCII: some templates write tools as Python does, with escapes
TOOL_PROBES: dict[str, Any] = {  # values for the keys of a tool
    "name": TOOL_PROBE,
    "description": TOOL_PROBE,
    "parameters": {"type": "object", "properties": {TOOL_PROBE: {"type": "string", "description": "-"}}},
}
# A part of a row that a template may show: (its label, the index of its message; None = it is the row's).
RowPart = tuple[str, int | None]


def describe_hidden_parts(chat: ChatTemplate, rows: Sequence[dict]) -> list[str]:
    """Return remarks on parts of the rows that are hidden, moved, repeated or, despite flags, not learned.

    rows: as they were read; the template can render each.
    """
    total = Counter(label for row in rows for label, _ in _list_parts(row))
    count_so_far: Counter[str] = Counter()
    examined: Counter[str] = Counter()
    hidden: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for row in rows:
        chosen = []
        for label, i in _list_parts(row):
            if count_so_far[label] % -(-total[label] // SAMPLE_SIZE) == 0:
                chosen.append((label, i))
            count_so_far[label] += 1
        if chosen:
            messages = chat.fit_messages(check_messages(row["messages"], ""))
            tools = check_tools(row.get("tools"), "")
            text = chat.apply(messages, tools)
            examined.update(label for label, _ in chosen)
            hidden.update(part[0] for part in chosen if _is_hidden(chat, messages, tools, text, part))
            outside.update(_find_outside_turns(chat, messages, tools, chosen))
    return [
        *_describe_hidden(examined, hidden),
        *_describe_outside(examined, outside),
        *_describe_flags(rows),
        *_describe_roles(rows),
        *_describe_repeated_endings(chat, rows),
        *_describe_generation_prompt(chat),
    ]


def spread_sample(items: Sequence[T]) -> Sequence[T]:
    """Return at most SAMPLE_SIZE of the items, spread over all."""
    return items[:: -(-len(items) // SAMPLE_SIZE) or 1]


def _list_parts(row: dict) -> Iterator[RowPart]:
    """Yield (label, index of the message or None) of each part of a row that a template may show."""
    if _has_content(row.get("tools")):
        yield "tools", None
        function = _tool_function((check_tools(row["tools"], "") or [{}])[0])
        yield from ((f"{key} of tools", None) for key in TOOL_PROBES if _has_content(function.get(key)))
    messages = row["messages"]
    last_question = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        calls = message.get("tool_calls")
        for key, value in message.items():
            if not _has_content(value) or key in ("role", *FLAGS):
                continue
            if key == "content":
                yield f"what role {message['role']} says" + " beside tool_calls" * _has_content(calls), i
                if message["role"] == "assistant" and THOUGHT_END in value[skip_empty_thought(value, 0) :]:
                    yield "<think> in content" + _turn_suffix(i, last_question), i
            else:
                yield key + _turn_suffix(i, last_question) * (key in REASONING), i
        if isinstance(calls, list) and len(calls) > 1:
            yield MORE_CALLS, i


def _turn_suffix(i: int, last_question: int) -> str:
    return " of earlier turns" if i < last_question else ""


def _has_content(value: Any) -> bool:
    return value not in (None, "", [], {}, "[]", "null")


def _is_hidden(
    chat: ChatTemplate, messages: list[dict], tools: list[dict] | None, text: str, part: RowPart
) -> bool:
    """Return whether a part has no effect: the text is the same without it, or lacks a probe in its place."""
    label, i = part
    try:
        if label == "tools":
            return chat.apply(messages, None) == text
        if i is None:
            return TOOL_PROBE not in chat.apply(
                messages, _put_tool_probe(tools, label.removesuffix(" of tools"))
            )
        if label.startswith("what role"):
            return PROBE not in chat.apply(_put_probe(messages, i, ("content",)), tools)
        keys = _part_keys(label)
        if all(isinstance(messages[i].get(key), str) for key in keys):
            return PROBE not in chat.apply(_put_probe(messages, i, keys), tools)
        variants = _remove_part(messages[i], label)
        changed = ([*messages[:i], message, *messages[i + 1 :]] for message in variants)
        return any(chat.apply(conversation, tools) == text for conversation in changed)
    except TEMPLATE_ERRORS:  # the template needs this part
        return False


def _remove_part(message: dict, label: str) -> list[dict]:
    """Return [the message without a part]; of a thought in the content, two variants without it.

    That thought is removed in two ways, since some templates keep the line breaks after it and others do not.
    """
    if label.startswith("<think>"):
        rest = message["content"].rpartition(THOUGHT_END)[2]
        return [message | {"content": rest}, message | {"content": rest.lstrip("\n")}]
    if label == MORE_CALLS:
        return [message | {"tool_calls": message["tool_calls"][:1]}]
    return [{name: value for name, value in message.items() if name not in _part_keys(label)}]


def _part_keys(label: str) -> tuple[str, ...]:
    """Return the keys of a message that hold a part; reasoning is under each of its names."""
    key = label.removesuffix(" of earlier turns")
    return REASONING if key in REASONING else (key,)


def _put_probe(messages: list[dict], i: int, keys: tuple[str, ...]) -> list[dict]:
    return [*messages[:i], messages[i] | dict.fromkeys(keys, PROBE), *messages[i + 1 :]]


def _tool_function(tool: dict) -> dict:
    """Return the description of a tool, which most rows hold under the key `function`."""
    return tool["function"] if isinstance(tool.get("function"), dict) else tool


def _put_tool_probe(tools: list[dict] | None, key: str) -> list[dict]:
    """Return the tools with a probe in their name, description or parameters."""
    probed = ((tool, _tool_function(tool) | {key: TOOL_PROBES[key]}) for tool in tools or ())
    return [tool | {"function": function} if "function" in tool else function for tool, function in probed]


def _find_outside_turns(
    chat: ChatTemplate, messages: list[dict], tools: list[dict] | None, parts: Sequence[RowPart]
) -> list[str]:
    """Return the labels of the assistant's texts, among `parts`, that are shown outside of its turn.

    Such text is not learned. Gemma 4 shows the text beside calls after their results. Rows that choose their
    turns by flags are left out.
    """
    label_start = "what role assistant says"
    answers = [(label, i) for label, i in parts if i is not None and label.startswith(label_start)]
    if not answers or any(flag in message for message in messages for flag in FLAGS):
        return []
    try:
        rendered = chat.render(messages, tools)
    except TEMPLATE_ERRORS:
        return []
    learned = [rendered.text[start:end] for start, end in rendered.learned]
    labels = []
    for label, i in answers:
        content = messages[i]["content"].strip()
        content = content[skip_empty_thought(content, 0) :]  # it may be part of the prompt
        if content in rendered.text and not any(content in text for text in learned):
            labels.append(label)
    return labels


def _describe_hidden(examined: Counter[str], hidden: Counter[str]) -> list[str]:
    """Return a list with one remark on what the template hides in some or all messages, or an empty list."""
    always = [label for label in sorted(examined) if hidden[label] == examined[label]]
    partly = [label for label in sorted(examined) if 0 < hidden[label] < examined[label]]
    if "tools" in always:
        always = [label for label in always if not label.endswith(" of tools")]
    parts = [join_names(always)] * bool(always) + [_format_count(label, hidden, examined) for label in partly]
    return [f"data: the chat template does not show {', '.join(parts)}"] if parts else []


def _describe_outside(examined: Counter[str], outside: Counter[str]) -> list[str]:
    """Return a list with one remark on assistant's text shown outside of its turn, or an empty list."""
    parts = ", ".join(_format_count(label, outside, examined) for label in sorted(outside))
    return [f"data: shown outside of the assistant's turn, and not learned: {parts}"] if parts else []


def _format_count(label: str, counts: Counter[str], examined: Counter[str]) -> str:
    return f"{join_names([label])} in {counts[label]} of {examined[label]} messages looked at"


def _describe_flags(rows: Sequence[dict]) -> list[str]:
    """Return a list with one remark on flags to learn other roles than the assistant, or an empty list."""
    flagged = sum(
        any(m.get(flag) and m["role"] != "assistant" for m in row["messages"] for flag in FLAGS)
        for row in rows
    )
    if not flagged:
        return []
    names = " or ".join(FLAGS)
    return [
        f"data: {flagged:,} rows set {names} for roles other than the assistant; only the assistant's turns"
        " are learned"
    ]


def _describe_roles(rows: Sequence[dict]) -> list[str]:
    """Return a list with one remark on roles not among ROLES, which may be misspelt, or an empty list."""
    roles = Counter(m["role"] for row in rows for m in row["messages"] if m["role"] not in ROLES)
    if not roles:
        return []
    names = join_names([f"{role} ({count:,})" for role, count in roles.most_common()])
    return [f"data: messages of the roles {names} are not learned; only the role assistant is"]


def _describe_repeated_endings(chat: ChatTemplate, rows: Sequence[dict]) -> list[str]:
    """Return a list with one remark on answers whose last token the template repeats, or an empty list."""
    endings = tuple(token for token in chat.ending_tokens() if token in chat.endings.after_answer)
    answers = [m.get("content") for row in rows for m in row["messages"] if m["role"] == "assistant"]
    repeated = sum(isinstance(text, str) and text.rstrip().endswith(endings) for text in answers)
    if not endings or not repeated:
        return []
    return [
        f"data: {repeated:,} answers end with {join_names(endings)}, which the chat template writes again:"
        " both are learned"
    ]


def _describe_generation_prompt(chat: ChatTemplate) -> list[str]:
    """Return a list with one remark if answers do not follow the generation prompt, or an empty list.

    DeepSeek R1's generation prompt opens a thought that the template leaves out of answers.
    """
    for opening in OPENINGS:
        try:
            prompt, learned_prompt = (
                chat.apply(opening, add_generation_prompt=True),
                chat.render_prompt(opening),
            )
        except TEMPLATE_ERRORS:  # the template needs another opening
            continue
        asks_without_thought = chat.empty_thought and learned_prompt.endswith(chat.empty_thought)
        if learned_prompt.startswith(prompt) or asks_without_thought:
            return []
        differing = prompt[max(len(learned_prompt) - 20, 0) :]
        return [
            f"data: the chat template asks for an answer with {differing!r}, but shows answers otherwise: the"
            " model does not learn to answer after that text, with which servers ask"
        ]
    return []


def describe_missing_endings(chat: ChatTemplate, learned: Sequence[str]) -> list[str]:
    """Return remarks on an ending of answers that is no token, and on answers learned without an ending.

    learned: the text of the last learned range of each row.
    """
    remarks, endings = [], tuple(chat.ending_tokens())
    if chat.marker:
        remarks.append(
            f"data: the chat template ends answers with {chat.marker!r}, for which the tokenizer has no"
            " token: it is learned as letters"
        )
        endings = (*endings, chat.marker)
    sample = spread_sample(learned)
    missing = sum(not text.rstrip().endswith(endings) for text in sample)
    if missing:
        remarks.append(
            f"data: {missing} of {len(sample)} last answers looked at are learned without an ending: the chat"
            " template shows none there, and the model is not taught to stop"
        )
    return remarks
