"""Decode answers, generated ones and those of the data, and bring their texts into one form."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

# Qwen3 and its template write it before an answer without a thought. Prompts of some models already open it.
OPEN_THOUGHT = "<think>"
EMPTY_THOUGHT = re.compile(r"\s*(<think>)?\s*</think>")


def decode_answer(ids: list[int], tokenizer, stop_ids: Collection[int], marker: str | None = None) -> str:
    """Return the text of an answer up to the token or the text that ends it.

    Args:
        ids: token ids, generated or of a row of the data.
        tokenizer: decodes them.
        stop_ids: token ids that end an answer.
        marker: a text that also ends an answer, such as the marker of the next question; None = none.
    """
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return text.partition(marker)[0] if marker else text


def is_empty_answer(answer: str, special_texts: Iterable[str | None]) -> bool:
    """Return whether an answer has only whitespace and special tokens.

    special_texts: BOS and EOS as texts write them; None = there is none.
    """
    for special in special_texts:
        answer = answer.replace(special, "") if special else answer
    return not answer.strip()


def skip_empty_thought(text: str, start: int, end: int | None = None) -> int:
    """Return where an answer begins behind an empty thought and its line breaks; `start` without one.

    start, end: range of the answer in the text; the text before it may open the thought.
    """
    end = len(text) if end is None else end
    thought = EMPTY_THOUGHT.match(text, start, end)
    is_opened = text[max(start - 20, 0) : start].rstrip().endswith(OPEN_THOUGHT)
    if thought is None or not (thought[1] or is_opened):
        return start
    answer = thought.end()
    while answer < end and text[answer] == "\n":
        answer += 1
    return answer


def normalize_answer(text: str) -> str:
    """Return an answer as scores compare it: in Unicode's NFC, stripped, without an empty thought before it.

    The tags of an empty thought would count as words that two answers have in common.
    """
    thought = EMPTY_THOUGHT.match(text)
    return unicodedata.normalize("NFC", text[thought.end() if thought else 0 :]).strip()
