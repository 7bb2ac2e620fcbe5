"""Texts -> tokens and targets: each row is tokenized once, before any process with a GPU is started.

Shapes: L tokens of one example.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from data.encoding import Offsets, encode, without_empty_answers
from data.examples import read_examples
from data.formats import Rendered
from data.rows import TokenizedRows
from options.errors import UserError


def prepare(
    dataset: str, dataset_format: str, samples: int, context_length: int, tokenizer, day: str | None = None
) -> TokenizedRows:
    """Read, render and tokenize --dataset, and cut its rows to context_length tokens.

    day: as in RenderContext. Raises UserError for anything wrong with the data, and if no example has a token
    to learn from.
    """
    examples = read_examples(dataset, dataset_format, samples, context_length, tokenizer, day)
    return tokenize(examples.rendered, tokenizer, context_length, f"--dataset {dataset}")


def tokenize(rendered: list[Rendered], tokenizer, context_length: int, where: str) -> TokenizedRows:
    """Tokenize rendered rows, with their targets.

    A token is a target if it holds a character of a learned range of the very text that was tokenized.
    Examples without a target are dropped and counted. where: what the error begins with if none is left.
    Raises UserError.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer cannot tell where a token lies in the text"
            " (no tokenizer.json)"
        )
    if tokenizer.eos_token_id is None and any(r.ends for r in rendered):
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no EOS token, so a model could not learn to stop"
        )
    special = SpecialTokens.of(tokenizer)
    tokens, learned, lengths, numbers, cut, prompts = [], [], [], [], 0, []
    for start in range(0, len(rendered), 1000):  # the library works on a batch in parallel
        block = [without_empty_answers(r, tokenizer) for r in rendered[start : start + 1000]]
        encoded = encode(tokenizer, [r.text for r in block], block[0].special)
        for example, (ids, offsets) in zip(block, encoded, strict=True):
            row, targets = _targets(example, ids, offsets, special)
            if targets.any():
                prompts.append(int(targets.argmax()))
            if targets[1:context_length].any():
                tokens.append(row[:context_length])
                learned.append(targets[:context_length])
                lengths.append(len(tokens[-1]))
                numbers.append(example.number)
                cut += len(row) > context_length
    if not lengths:
        why = f"the shortest prompt takes {min(prompts)} tokens" if prompts else "no answer has any text"
        raise UserError(
            f"{where}: none of the {len(rendered)} rows has anything to learn from within --context_length"
            f" {context_length} ({why})"
        )
    starts = np.concatenate([[0], np.cumsum(lengths)])
    all_tokens, all_learned = (torch.from_numpy(np.concatenate(a)) for a in (tokens, learned))
    dropped = len(rendered) - len(lengths)
    return TokenizedRows(
        all_tokens, all_learned, torch.from_numpy(starts), dropped, cut, torch.tensor(numbers)
    )


@dataclass(frozen=True)
class Answer:
    """The learned tokens of an answer, which may hold characters beside it.

    Args:
        ids: the tokens.
        prompt_overlap: characters of the prompt in the first of them.
        tail_overlap: characters of what follows the answer in the last of them.
    """

    ids: list[int]
    prompt_overlap: str
    tail_overlap: str


def last_answer(example: Rendered, tokenizer) -> Answer:
    """Return the last answer of an example, which has one, as training learns it."""
    example = dataclasses.replace(example, learned=[example.last_answer], last=-1)
    ((ids, offsets),) = encode(tokenizer, [example.text], example.special)
    tokens, targets = _targets(example, ids, offsets, SpecialTokens.of(tokenizer))
    ((start, end),) = example.learned
    inside = [(begin, stop) for begin, stop in offsets if begin < end and stop > start]
    first, last = min((b for b, _ in inside), default=start), max((s for _, s in inside), default=end)
    return Answer(tokens[targets].tolist(), example.text[first:start], example.text[end:last])


@dataclass(frozen=True)
class SpecialTokens:
    """BOS and EOS of a tokenizer, as ids, and EOS as texts write it; None = it has none."""

    bos: int | None
    eos: int | None
    written_eos: str | None

    @classmethod
    def of(cls, tokenizer) -> SpecialTokens:
        return cls(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token)


def _targets(
    example: Rendered, ids: list[int], offsets: Offsets, special: SpecialTokens
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [L] int32, which of them are targets [L] bool), with the EOS token where one is due."""
    begins, ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(ids)).reshape(-1, 2).T
    # Tokenizers with trim_offsets (Llama 3) report a token of spaces as empty, at its end: it begins where
    # the token before it ended.
    begins = np.where(begins == ends, np.append(0, ends[:-1]), begins) if ids else begins
    targets = np.zeros(len(ids), dtype=bool)
    for start, end in example.learned:
        targets |= (begins < end) & (ends > start)
    tokens = np.asarray(ids, dtype=np.int32)
    if special.bos not in (None, special.eos):  # one token for both is learned, as EOS
        targets &= tokens != special.bos
    if not (example.ends and example.learned):
        return tokens, targets
    return _closed(example, tokens, targets, np.maximum(begins, ends), special)


def _closed(
    example: Rendered, tokens: np.ndarray, targets: np.ndarray, ends: np.ndarray, special: SpecialTokens
) -> tuple[np.ndarray, np.ndarray]:
    """The same with one EOS token at the end, a target. Where the answer ends with EOS as text, or the
    tokenizer writes one by itself, that is the one; whitespace and further ones behind it are cut."""
    assert special.eos is not None and special.written_eos is not None
    start, first, behind = example.learned[-1][0], None, len(example.text)
    for i in np.flatnonzero(tokens == special.eos)[::-1].tolist():
        between = example.text[ends[i] : behind].replace(special.written_eos, "")
        if ends[i] <= start or between.strip():
            break
        first, behind = i, ends[i]
    if first is None:
        return np.append(tokens, np.int32(special.eos)), np.append(targets, True)
    targets[first] = True
    return tokens[: first + 1], targets[: first + 1]
