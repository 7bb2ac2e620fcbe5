"""Show examples as texts, with what is learned of them marked."""

from __future__ import annotations

from itertools import groupby

from data.rows import TokenizedRows

BEGIN, END = "[[", "]]"  # around what is learned


def describe_examples(rows: TokenizedRows, count: int, tokenizer) -> list[str]:
    """Return a text of each of the first `count` examples: its row, its numbers of tokens, and its tokens.

    Special tokens are shown. What is learned stands between BEGIN and END.
    """
    texts = []
    for i in range(min(count, len(rows))):
        one = slice(int(rows.starts[i]), int(rows.starts[i + 1]))
        ids, learned = rows.tokens[one].tolist(), rows.learned[one].tolist()
        head = f"row {int(rows.row_numbers[i])}: {len(ids):,} tokens, {sum(learned[1:]):,} of them learned"
        texts.append(f"{head}\n{mark_learned(ids, learned, tokenizer)}")
    return texts


def mark_learned(ids: list[int], learned: list[bool], tokenizer) -> str:
    """Return the text of an example's tokens, with BEGIN and END around the learned ones."""
    text, end = "", 0
    for is_learned, group in groupby(learned):
        begin, end = end, end + len(list(group))
        before, until = _decode(ids[:begin], tokenizer), _decode(ids[:end], tokenizer)
        # Some tokenizers write a token otherwise at the beginning of a text. A character may be split between
        # learned and other tokens; then each part is shown by itself.
        part = until[len(before) :] if until.startswith(before) else _decode(ids[begin:end], tokenizer)
        text += f"{BEGIN}{part}{END}" if is_learned else part
    return text


def _decode(ids: list[int], tokenizer) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
