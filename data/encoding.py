"""Encode texts as token ids, with one BOS at the beginning, and prompts without the EOS of the tokenizer."""

from __future__ import annotations

import dataclasses
import re

from data.answers import is_empty_answer
from data.formats import Rendered
from files.tokenizer import convert_tokenizer_errors
from options.errors import UserError

# [start, end) characters of each token; empty for a token without a text.
Offsets = list[tuple[int, int]]


def encode(tokenizer, texts: list[str], add_special_tokens: bool) -> list[tuple[list[int], Offsets]]:
    """Return (token ids, character range of each token) of each text. At most one BOS stays at the start.

    A text that begins with BOS keeps one BOS: the tokenizer's own, and whitespace before the text's, are cut.

    Args:
        tokenizer: one that returns offsets (is_fast).
        texts: of any number of rows.
        add_special_tokens: whether the tokenizer adds its own BOS and the like.

    Raises UserError if the tokenizer fails, or returns an id that int32 cannot hold.
    """
    with convert_tokenizer_errors(tokenizer):
        encoded = tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
    largest = max((max(ids) for ids in encoded["input_ids"] if ids), default=0)
    if largest >= 2**31:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer returns the token id {largest}, which is too large"
        )
    bos, bos_text = tokenizer.bos_token_id, tokenizer.bos_token
    stripping = {i for i, t in tokenizer.added_tokens_decoder.items() if t.lstrip or t.rstrip}
    rows = []
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if stripping:
            offsets = _strip_offsets(text, ids, offsets, stripping)
        rows.append(_keep_one_bos(text, ids, offsets, bos, bos_text))
    return rows


def _strip_offsets(text: str, ids: list[int], offsets: Offsets, stripping: set[int]) -> Offsets:
    """Return the offsets without the whitespace that tokens with an id of `stripping` swallow.

    Phi-3's <|assistant|> swallows the whitespace at the start of an answer, and is no part of the answer.
    """
    return [
        (end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip()))
        if i in stripping
        else (start, end)
        for i, (start, end) in zip(ids, offsets, strict=True)
    ]


def _keep_one_bos(
    text: str, ids: list[int], offsets: Offsets, bos: int | None, bos_text: str | None
) -> tuple[list[int], Offsets]:
    """Return the ids and offsets without the BOS tokens, and whitespace, before the last BOS at the start."""
    if bos_text is None or not ids or ids[0] != bos or not text.lstrip().startswith(bos_text):
        return ids, offsets
    last = 0  # the last BOS token that only whitespace and BOS precede
    for i, token in enumerate(ids):
        if token == bos:
            if text[offsets[last][1] : offsets[i][0]].replace(bos_text, "").strip():
                break
            last = i
    return ids[last:], offsets[last:]


def drop_empty_answers(example: Rendered, tokenizer) -> Rendered:
    """Remove empty learned ranges, and BOS at the start of each answer and at the end of the row.

    Such ranges have only BOS, EOS and whitespace. The row already begins with a BOS, and at inference none
    follows the prompt. Elsewhere a BOS stays, such as between the turns of a text. In a conversation a range
    may be the EOS that ends a turn: it stays, too.
    """
    result = _drop_answer_bos(example, tokenizer)
    if result is example and not example.add_special_tokens:
        return example  # `ChatTemplate.render` has left out the empty answers of a conversation
    special_texts = (tokenizer.bos_token, tokenizer.eos_token if example.add_special_tokens else None)
    learned = [
        span for span in result.learned if not is_empty_answer(result.text[slice(*span)], special_texts)
    ]
    needs_eos = result.needs_eos and learned[-1:] == result.learned[-1:]  # an empty answer gets no EOS
    return dataclasses.replace(result, learned=learned, needs_eos=needs_eos)


def _drop_answer_bos(example: Rendered, tokenizer) -> Rendered:
    """Return the example without BOS at the start of its answers and at its end; unchanged if it has none."""
    bos_text = tokenizer.bos_token
    if bos_text is None or bos_text == tokenizer.eos_token or bos_text not in example.text:
        return example
    leading_bos = re.compile(rf"(?:\s*{re.escape(bos_text)})+")
    text, learned, read = "", [], 0  # read: number of characters of example.text that `text` covers
    for start, end in example.learned:
        match = leading_bos.match(example.text, start, end) if start else None
        text += example.text[read:start]
        new_start, read = len(text), start
        if match:
            text, read = text + match.group().replace(bos_text, ""), match.end()
        text, read = text + example.text[read:end], end
        if example.needs_eos and end == example.learned[-1][1]:
            content_end = _find_content_end(text, (bos_text, tokenizer.eos_token))
            text = text[:content_end] + text[content_end:].replace(bos_text, "")
        learned.append((new_start, len(text)))
    return dataclasses.replace(example, text=text + example.text[read:], learned=learned)


def _find_content_end(text: str, special_texts: tuple[str | None, ...]) -> int:
    """Return the index where the whitespace and special tokens at the end of a text begin."""
    end, last_end = len(text), -1
    while end != last_end:
        last_end = end
        while end and text[end - 1].isspace():  # rstrip would copy a long text many times
            end -= 1
        specials = (special for special in special_texts if special and text.endswith(special, 0, end))
        end -= len(next(specials, ""))
    return end


def encode_prompt(text: str, tokenizer, add_special_tokens: bool) -> list[int]:
    """Return the token ids of a prompt, without the EOS that the tokenizer may add to every text.

    In training that EOS was after the answer.
    """
    ((ids, offsets),) = encode(tokenizer, [text], add_special_tokens)
    has_added_eos = bool(ids) and ids[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]
    return ids[:-1] if has_added_eos else ids
