"""Show examples as texts, with special tokens visible and what is learned marked.

A backslash stands before characters of the data that would read like a mark or a special token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby

from data.rows import TokenizedRows

BEGIN, END = "[[", "]]"  # around what is learned
LEGEND = (
    "rows: what is learned is between [[ and ]]. In the data's own text \\\\ is one backslash, a backslash"
    " stands before brackets and names of special tokens, and \\x1b or \\u202e is a control character"
)
# Brackets that a reader could take for BEGIN or END: several in a row, or beside a mark at a part's end.
BRACKETS = r"\[{2,}|\]{2,}|\A[\[\]]+|[\[\]]+\Z"
# Characters that a terminal obeys, or that reorder its text; line breaks and tabs are shown.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
IMAGE_PART = "<image: "  # begins the text of an image
CONTEXT_TOKENS = 16  # before a part, as some tokenizers write a token otherwise at the beginning of a text
RECORDED_ROWS = 3  # examples that run.json records, or more: one of each set at least
END_TOKENS = 512  # at each end of a long row that are recorded
MAX_PART_CHARS = 4000  # of a part that is recorded


@dataclass(frozen=True)
class RowPart:
    """Tokens of an example that stand behind one another, as a text.

    Attributes:
        text: of the tokens.
        is_learned: whether they are targets.
        is_special: whether they are special tokens of the tokenizer.
    """

    text: str
    is_learned: bool
    is_special: bool


@dataclass(frozen=True)
class RecordedRow:
    """An example as run.json records it, for the report.

    Attributes:
        number: of its row in the dataset, from 1.
        tokens: number of its tokens.
        learned: number of its targets.
        head: its parts, or those of its first END_TOKENS tokens.
        omitted: number of tokens that are left out between head and tail.
        tail: the parts of its last END_TOKENS tokens, if some are left out.
        set: the name of its set of a mixture; "" = there is one set.
    """

    number: int
    tokens: int
    learned: int
    head: list[RowPart]
    omitted: int = 0
    tail: Sequence[RowPart] = ()
    set: str = ""


def describe_examples(rows: TokenizedRows, count: int, tokenizer) -> list[str]:
    """Return a text of each of the first `count` examples: its row, its numbers of tokens, and its tokens.

    Of a mixture, the first examples of each set. They are marked as LEGEND says.
    """
    texts = []
    for i in _first_examples(rows, count):
        one = _read_example(rows, i)
        head = f"row {rows.row_name(i)}: {len(one.ids):,} tokens, {sum(one.learned[1:]):,} of them learned"
        texts.append(f"{head}\n{mark_learned(one, tokenizer)}")
    return texts


def _first_examples(rows: TokenizedRows, count: int) -> Iterable[int]:
    """Return the indices of the first `count` examples; of a mixture, those of the first ones of each set."""
    sizes = [each.size for each in rows.sets] or [len(rows)]
    starts = accumulate(sizes, initial=0)
    firsts = (range(start, start + min(count, size)) for start, size in zip(starts, sizes, strict=False))
    return chain.from_iterable(firsts)


def record_examples(rows: TokenizedRows, tokenizer) -> list[RecordedRow]:
    """Return the first RECORDED_ROWS examples for run.json. Long ones lose their middle.

    Of a mixture, as many of each set as make RECORDED_ROWS in all, and one at least.
    """
    recorded = []
    for i in _first_examples(rows, math.ceil(RECORDED_ROWS / max(len(rows.sets), 1))):
        one = _read_example(rows, i)
        size = len(one.ids)
        counts, name = (int(rows.row_numbers[i]), size, sum(one.learned[1:])), rows.set_name(i)
        if size <= 2 * END_TOKENS:
            recorded.append(RecordedRow(*counts, _clip(split_example(one, tokenizer)), set=name))
            continue
        ends = one.take(0, END_TOKENS), one.take(size - END_TOKENS, size)
        head, tail = (_clip(split_example(end, tokenizer)) for end in ends)
        recorded.append(RecordedRow(*counts, head, size - 2 * END_TOKENS, tail, name))
    return recorded


@dataclass(frozen=True)
class ExampleTokens:
    """The tokens of an example, or some that stand behind one another.

    Attributes:
        ids: of the tokens.
        learned: whether each is a target.
        labels: of the images whose parts are among the tokens, in their order.
        image_id: the id of a part of an image; -1 = there are none.
    """

    ids: list[int]
    learned: list[bool]
    labels: Sequence[str] = ()
    image_id: int = -1

    def take(self, start: int, end: int) -> ExampleTokens:
        """Return the tokens [start, end)."""
        first, count = self._count_images(0, start), self._count_images(start, end)
        first -= (
            start > 0 and self.ids[start - 1 : start + 1] == [self.image_id] * 2
        )  # the cut one counts twice
        span = slice(start, end)
        return ExampleTokens(
            self.ids[span], self.learned[span], self.labels[first : first + count], self.image_id
        )

    def _count_images(self, start: int, end: int) -> int:
        """Return the number of images that have parts among the tokens [start, end)."""
        return sum(is_image for is_image, _ in groupby(i == self.image_id for i in self.ids[start:end]))


def _read_example(rows: TokenizedRows, i: int) -> ExampleTokens:
    """Return the tokens of example i."""
    one = slice(int(rows.starts[i]), int(rows.starts[i + 1]))
    labels = [ref.label for ref in rows.images.of_row(i)]
    return ExampleTokens(rows.tokens[one].tolist(), rows.learned[one].tolist(), labels, rows.image_id)


def _clip(parts: list[RowPart]) -> list[RowPart]:
    """Return the parts with texts of at most MAX_PART_CHARS: one token may stand for a long text."""
    return [RowPart(part.text[:MAX_PART_CHARS], part.is_learned, part.is_special) for part in parts]


def mark_learned(example: ExampleTokens, tokenizer) -> str:
    """Return the text of an example's tokens, with BEGIN and END around the learned ones, as LEGEND says."""

    def is_token(part: RowPart) -> bool:
        """Return whether a part is special tokens, and no image: the text of one has its name."""
        return part.is_special and not part.text.startswith(IMAGE_PART)

    names = sorted(_special_names(tokenizer), key=len, reverse=True)
    to_escape = re.compile("|".join([r"\\", BRACKETS, *map(re.escape, names)]))
    text = ""
    for is_learned, parts in groupby(split_example(example, tokenizer), lambda part: part.is_learned):
        group = "".join(
            _show_control(part.text if is_token(part) else to_escape.sub(_escape, part.text))
            for part in parts
        )
        text += f"{BEGIN}{group}{END}" if is_learned else group
    return text


def _special_names(tokenizer) -> set[str]:
    """Return the texts of a tokenizer's special tokens."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {name for name in added | set(tokenizer.all_special_tokens) if name}


def _escape(match: re.Match) -> str:
    """Return a matched text with a backslash before it, or before each of its brackets."""
    text = match[0]
    return "".join(f"\\{bracket}" for bracket in text) if text.strip("[]") == "" else f"\\{text}"


def _show_control(text: str) -> str:
    """Return a text with control characters as \\x1b or \\u202e."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1].replace("\\r", "\\x0d"), text)


def split_example(example: ExampleTokens, tokenizer) -> list[RowPart]:
    """Return an example's tokens as parts, split where tokens begin or cease to be learned or special.

    The texts of the parts together are that of all tokens, unless a character is split between two parts. An
    image is a part that says what it is.
    """
    ids = example.ids
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids) | {example.image_id}
    labels = iter(example.labels)
    parts, end = [], 0
    kinds = zip(
        example.learned, (i in special for i in ids), (i == example.image_id for i in ids), strict=True
    )
    for (is_learned, is_special, is_image), group in groupby(kinds):
        begin, end = end, end + len(list(group))
        if is_image:
            text = f"{IMAGE_PART}{next(labels)}, {end - begin:,} tokens>"
            parts.append(RowPart(text, is_learned, is_special))
            continue
        context = max(begin - CONTEXT_TOKENS, 0)
        before, until = _decode(ids[context:begin], tokenizer), _decode(ids[context:end], tokenizer)
        # A character may be split between two parts; then each part is shown by itself.
        text = until[len(before) :] if until.startswith(before) else _decode(ids[begin:end], tokenizer)
        parts.append(RowPart(text, is_learned, is_special))
    return parts


def _decode(ids: list[int], tokenizer) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
