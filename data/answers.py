"""Token ids of an answer -> its text, by one function for generated answers and for those of the data; and
whether an answer has any text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

# What Qwen3 and its template write before an answer without a thought; prompts of some models open it.
EMPTY_THOUGHT = re.compile(r"\s*(<think>)?\s*</think>")


def answer_text(ids: list[int], tokenizer, stops: Collection[int], marker: str | None = None) -> str:
    """The text of an answer up to what ends it.

    Args:
        ids: generated, or of a row of the data.
        stops: token ids that end an answer.
        marker: a text that ends one as well, such as the next question's in a dialogue; None = there is none.
    """
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return text.partition(marker)[0] if marker else text


def is_empty(answer: str, markers: Iterable[str | None]) -> bool:
    """Whether an answer has no text beside whitespace and the tokens `markers`, BOS and EOS; None = there is
    none."""
    for written in markers:
        answer = answer.replace(written, "") if written else answer
    return not answer.strip()


def comparable(text: str) -> str:
    """An answer as scores compare it: in Unicode's NFC, without whitespace around it, and without an empty
    thought before it, whose tags would count as words that two answers have in common."""
    thought = EMPTY_THOUGHT.match(text)
    return unicodedata.normalize("NFC", text[thought.end() if thought else 0 :]).strip()
