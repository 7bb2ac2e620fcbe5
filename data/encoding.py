"""Texts -> token ids: one BOS at the beginning, and prompts without the EOS that a tokenizer may add."""

from __future__ import annotations

import dataclasses
import re

from data.answers import is_empty
from data.formats import Rendered
from files.tokenizer import convert_tokenizer_errors
from options.errors import UserError

# [begin, end) characters of each token; empty for a token that no text stands for.
Offsets = list[tuple[int, int]]


def encode(tokenizer, texts: list[str], special: bool) -> list[tuple[list[int], Offsets]]:
    """Tokenize texts. Return the token ids of each, and where they lie in it.

    A text that begins with BOS keeps one: the tokenizer's own and whitespace before the written one are cut.

    Args:
        tokenizer: one with offsets (is_fast).
        special: the tokenizer adds its own BOS and the like.

    Raises UserError if the tokenizer fails, or makes an id that int32 cannot hold.
    """
    with convert_tokenizer_errors(tokenizer):
        encoded = tokenizer(
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
    largest = max((max(ids) for ids in encoded["input_ids"] if ids), default=0)
    if largest >= 2**31:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer makes the id {largest}")
    bos, written = tokenizer.bos_token_id, tokenizer.bos_token
    rows = zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [_with_one_bos(text, ids, offsets, bos, written) for text, ids, offsets in rows]


def _with_one_bos(
    text: str, ids: list[int], offsets: Offsets, bos: int | None, written: str | None
) -> tuple[list[int], Offsets]:
    if written is None or not ids or ids[0] != bos or not text.lstrip().startswith(written):
        return ids, offsets
    last = 0  # of the BOS tokens that only whitespace stands between
    for i, token in enumerate(ids):
        if token == bos:
            if text[offsets[last][1] : offsets[i][0]].replace(written, "").strip():
                break
            last = i
    return ids[last:], offsets[last:]


def without_empty_answers(example: Rendered, tokenizer) -> Rendered:
    """Remove BOS at the start of an answer and at the end of a row, and learned ranges of nothing but BOS,
    EOS and whitespace.

    The row already begins with a BOS, and at inference none follows the prompt. Elsewhere a BOS stays, as
    between the turns of a text. In a conversation a range may be the EOS that closes a turn: it stays, too.
    """
    found = _without_answer_bos(example, tokenizer)
    if found is example and not example.special:
        return example  # what is empty in a conversation, its template has said
    markers = (tokenizer.bos_token, tokenizer.eos_token if example.special else None)
    left = [span for span in found.learned if not is_empty(found.text[slice(*span)], markers)]
    ends = found.ends and left[-1:] == found.learned[-1:]  # nothing ends an answer that is none
    return dataclasses.replace(found, learned=left, ends=ends)


def _without_answer_bos(example: Rendered, tokenizer) -> Rendered:
    written = tokenizer.bos_token
    if written is None or written == tokenizer.eos_token or written not in example.text:
        return example
    repeated = re.compile(rf"(?:\s*{re.escape(written)})+")
    text, learned, read = "", [], 0  # read: characters of example.text that `text` stands for
    for start, end in example.learned:
        found = repeated.match(example.text, start, end) if start else None
        text += example.text[read:start]
        begin, read = len(text), start
        if found:
            text, read = text + found.group().replace(written, ""), found.end()
        text, read = text + example.text[read:end], end
        if example.ends and end == example.learned[-1][1]:
            kept = _last_character(text, (written, tokenizer.eos_token))
            text = text[:kept] + text[kept:].replace(written, "")
        learned.append((begin, len(text)))
    return dataclasses.replace(example, text=text + example.text[read:], learned=learned)


def _last_character(text: str, markers: tuple[str | None, ...]) -> int:
    """Return where whitespace and markers begin that end the text."""
    end = len(text)
    while True:
        stripped = len(text[:end].rstrip()) if text[end - 1 : end].isspace() else end
        found = [m for m in markers if m and text.endswith(m, 0, stripped)]
        if stripped == end and not found:
            return end
        end = stripped - len(found[0]) if found else stripped


def prompt_ids(text: str, tokenizer, special: bool) -> list[int]:
    """Tokenize a prompt. An EOS that the tokenizer puts behind every text is left out: training had it behind
    the answer."""
    ((ids, offsets),) = encode(tokenizer, [text], special)
    added = bool(ids) and ids[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]
    return ids[:-1] if added else ids
