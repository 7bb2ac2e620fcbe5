"""Decode answers, generated ones and those of the data, and bring their texts into one form."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

# Qwen3 and its template write it before an answer without a thought. Prompts of some models already open it.
OPEN_THOUGHT = "<think>"
EMPTY_THOUGHT = re.compile(r"\s*(<think>)?\s*</think>")
# A whole one at the end of a prompt, with the line breaks after it.
LAST_EMPTY_THOUGHT = re.compile(rf"{OPEN_THOUGHT}\s*</think>\n*\Z")
WORD = re.compile(r"\S+")
# Repetitions that a terminal does not show: of a phrase of so many words at most, that stands so often.
LONGEST_PHRASE, MIN_REPEATS, KEPT_REPEATS = 8, 6, 3
# A string without spaces that stands at least MIN_REPEATS times: "!!!!!!", "nonononono..."
STRING_RUN = re.compile(rf"(\S{{1,40}}?)\1{{{MIN_REPEATS - 1},}}")
# A repetition is shown whole up to this width, since it may be the right answer: "0 0 0 0 0 0 0".
LINE_WIDTH = 80  # columns of a terminal; Chinese, Japanese and Korean characters take two
CUT_MARK = " ... (repeated)"


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


def make_printable(text: str) -> str:
    """Replace control characters of a model's text: on a terminal they could move the cursor or worse."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def cut_repetition(text: str) -> str:
    """Return a text for a terminal in which what is repeated many times stands KEPT_REPEATS times.

    CUT_MARK replaces the others. Repetitions of up to LONGEST_PHRASE words are cut, and those of a string
    without spaces (STRING_RUN), if they are wider than a line. The last repetition of the text may be
    incomplete.
    """
    return _cut_strings(_cut_phrases(text))


def _cut_phrases(text: str) -> str:
    """Return the text with repetitions of words cut."""
    words = list(WORD.finditer(text))
    texts = [word[0] for word in words]
    shown, read, i = "", 0, 0  # read: characters of the text that `shown` covers
    while i < len(words):
        size, repeats = _count_repeats(texts, i)
        last = i + size * repeats - 1
        if repeats < MIN_REPEATS or _measure_width(text[words[i].start() : words[last].end()]) <= LINE_WIDTH:
            i += 1
            continue
        i = last + 1
        shown += text[read : words[i - size * (repeats - KEPT_REPEATS) - 1].end()] + CUT_MARK
        read = words[i - 1].end()
        rest = texts[i:]
        # What the longest answer has cut off is a repetition as well.
        if len(rest) <= size and " ".join(texts[i - size : i]).startswith(" ".join(rest)):
            return shown
    return shown + text[read:]


def _cut_strings(text: str) -> str:
    """Return the text with repetitions of a string without spaces cut."""
    shown, read = "", 0
    for run in STRING_RUN.finditer(text):
        if _measure_width(run[0]) <= LINE_WIDTH:
            continue
        shown += text[read : run.start()] + run[1] * KEPT_REPEATS + CUT_MARK
        read = run.end()
        if run[1].startswith(text[read:]):  # the rest is cut off, too
            return shown
    return shown + text[read:]


def _measure_width(text: str) -> int:
    """Return the columns that a text takes on a terminal."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _count_repeats(words: list[str], start: int) -> tuple[int, int]:
    """Return (number of words of the phrase at `start` that is repeated most often, how often it stands)."""
    counts = {}
    for size in range(1, LONGEST_PHRASE + 1):
        phrase, end = words[start : start + size], start + size
        while words[end : end + size] == phrase:
            end += size
        counts[size] = (end - start) // size
    return max(counts.items(), key=lambda item: item[1])


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
