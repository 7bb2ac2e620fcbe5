"""Show examples as texts, with special tokens visible and what is learned marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby

from data.rows import TokenizedRows

BEGIN, END = "[[", "]]"  # around what is learned
CONTEXT_TOKENS = 16  # before a part, as some tokenizers write a token otherwise at the beginning of a text
RECORDED_ROWS = 3  # examples that run.json records
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
    """

    number: int
    tokens: int
    learned: int
    head: list[RowPart]
    omitted: int = 0
    tail: Sequence[RowPart] = ()


def describe_examples(rows: TokenizedRows, count: int, tokenizer) -> list[str]:
    """Return a text of each of the first `count` examples: its row, its numbers of tokens, and its tokens.

    Of a mixture, the first examples of each set. Special tokens are shown. What is learned stands between
    BEGIN and END.
    """
    texts = []
    sizes = [each.size for each in rows.sets] or [len(rows)]
    starts = accumulate(sizes, initial=0)
    firsts = (range(start, start + min(count, size)) for start, size in zip(starts, sizes, strict=False))
    for i in chain.from_iterable(firsts):
        ids, learned = _read_example(rows, i)
        head = f"row {rows.row_name(i)}: {len(ids):,} tokens, {sum(learned[1:]):,} of them learned"
        texts.append(f"{head}\n{mark_learned(ids, learned, tokenizer)}")
    return texts


def record_examples(rows: TokenizedRows, tokenizer) -> list[RecordedRow]:
    """Return the first RECORDED_ROWS examples for run.json. Long ones lose their middle."""
    recorded = []
    for i in range(min(RECORDED_ROWS, len(rows))):
        ids, learned = _read_example(rows, i)
        counts = int(rows.row_numbers[i]), len(ids), sum(learned[1:])
        if len(ids) <= 2 * END_TOKENS:
            recorded.append(RecordedRow(*counts, _clip(split_example(ids, learned, tokenizer))))
            continue
        head, tail = (
            _clip(split_example(ids[end], learned[end], tokenizer))
            for end in (slice(END_TOKENS), slice(-END_TOKENS, None))
        )
        recorded.append(RecordedRow(*counts, head, len(ids) - 2 * END_TOKENS, tail))
    return recorded


def _read_example(rows: TokenizedRows, i: int) -> tuple[list[int], list[bool]]:
    """Return the token ids of example i, and whether each is learned."""
    one = slice(int(rows.starts[i]), int(rows.starts[i + 1]))
    return rows.tokens[one].tolist(), rows.learned[one].tolist()


def _clip(parts: list[RowPart]) -> list[RowPart]:
    """Return the parts with texts of at most MAX_PART_CHARS: one token may stand for a long text."""
    return [RowPart(part.text[:MAX_PART_CHARS], part.is_learned, part.is_special) for part in parts]


def mark_learned(ids: list[int], learned: list[bool], tokenizer) -> str:
    """Return the text of an example's tokens, with BEGIN and END around the learned ones."""
    text = ""
    for is_learned, parts in groupby(split_example(ids, learned, tokenizer), lambda part: part.is_learned):
        group = "".join(part.text for part in parts)
        text += f"{BEGIN}{group}{END}" if is_learned else group
    return text


def split_example(ids: list[int], learned: list[bool], tokenizer) -> list[RowPart]:
    """Return an example's tokens as parts, split where tokens begin or cease to be learned or special.

    The texts of the parts together are that of all tokens, unless a character is split between two parts.
    """
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids)
    parts, end = [], 0
    for (is_learned, is_special), group in groupby(zip(learned, (i in special for i in ids), strict=True)):
        begin, end = end, end + len(list(group))
        context = max(begin - CONTEXT_TOKENS, 0)
        before, until = _decode(ids[context:begin], tokenizer), _decode(ids[context:end], tokenizer)
        # A character may be split between two parts; then each part is shown by itself.
        text = until[len(before) :] if until.startswith(before) else _decode(ids[begin:end], tokenizer)
        parts.append(RowPart(text, is_learned, is_special))
    return parts


def _decode(ids: list[int], tokenizer) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
