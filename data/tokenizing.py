"""Tokenize texts, with their targets: each row once, before any process with a GPU is started.

Shapes: L tokens of one example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from data.answers import decode_answer, normalize_answer
from data.chat_remarks import spread_sample
from data.dataset_names import Share
from data.encoding import Offsets, drop_empty_answers, encode, encode_prompt
from data.examples import read_examples
from data.formats import Rendered
from data.image_format import ImageFormat
from data.image_texts import check_image_tokens, expand_images, locate_images
from data.kept_rows import KeptRows
from data.reading import ReadingOptions
from data.rows import MixedSet, TokenizedRows, join_sets
from data.shares import count_rows_per_epoch
from options.errors import UserError

# The library holds up to 2 KB for each token of a block, so rows of whole books come a few at a time.
BLOCK_ROWS, BLOCK_CHARACTERS = 1000, 2**19


def tokenize_dataset(dataset: str, options: ReadingOptions) -> TokenizedRows:
    """Read, render and tokenize a set, and cut its rows to context_length tokens.

    Raises UserError for anything wrong with the data, and if no example has a token to learn from.

    Args:
        dataset: a recipe, file, folder or hub id.
        options: how it is read; the tokenizer must return offsets (is_fast).
    """
    examples = read_examples(dataset, options)
    reading = options.tokenizer, options.context_length, f"--dataset {dataset}", options.image_format
    return tokenize(examples.rendered, *reading)


def tokenize_sets(
    sets: Sequence[list[Rendered]],
    shares: Sequence[Share],
    tokenizer,
    context_length: int,
    image_format: ImageFormat | None = None,
) -> TokenizedRows:
    """Tokenize the training rows of a run: of one set, or of a mixture with its rows per epoch.

    Args:
        sets: the rows of each set.
        shares: the name of each set and, if it is weighted, its weight.
        tokenizer, context_length, image_format: as for `tokenize`.

    Raises UserError as `tokenize` does, for each set, and for weights that give a set no row in an epoch.
    """
    parts = [
        tokenize(rendered, tokenizer, context_length, f"--dataset {share.name}", image_format)
        for rendered, share in zip(sets, shares, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    names, counts = [share.name for share in shares], [len(rows) for rows in parts]
    weights = [share.weight for share in shares if share.weight is not None]
    per_epoch = count_rows_per_epoch(names, counts, weights) if weights else counts
    return join_sets(parts, [MixedSet(*values) for values in zip(names, counts, per_epoch, strict=True)])


def tokenize(
    rendered: list[Rendered],
    tokenizer,
    context_length: int,
    error_prefix: str,
    image_format: ImageFormat | None = None,
) -> TokenizedRows:
    """Tokenize rendered rows, with their targets, and cut them to context_length tokens.

    A token is a target if it has a character of a learned range of the text that was tokenized, and none of
    an image. Examples without a target are dropped. These and the cut ones are counted by reason. A row whose
    last token would be within an image is cut before that image.

    Args:
        rendered: the rows, all of one format.
        tokenizer: encodes the texts; one that returns offsets (is_fast).
        context_length: maximum number of tokens of a row.
        error_prefix: begins the error if no example is left.
        image_format: how the model takes images; None = it takes none.

    Raises UserError if no example is left, if an image alone has more tokens, if a token of images is outside
    of the images, and if the tokenizer has no offsets or lacks an EOS that the rows need.
    """
    _check_tokenizer(tokenizer, needs_eos=any(r.needs_eos for r in rendered))
    special = SpecialTokens.from_tokenizer(tokenizer)
    kept = KeptRows(context_length, image_format)
    image_ids = tokenizer.convert_tokens_to_ids([*image_format.reserved]) if image_format else []
    expanded = (expand_images(drop_empty_answers(r, tokenizer), image_format) for r in rendered)
    for block in cut_blocks(expanded):  # the library works on a block in parallel
        encoded = encode(tokenizer, [r.text for r in block], block[0].add_special_tokens)
        for example, (ids, offsets) in zip(block, encoded, strict=True):
            spans = locate_images(example, ids, offsets, image_format, context_length)
            check_image_tokens(ids, spans, image_ids, f"{error_prefix}: row {example.row_number}")
            row, targets = _targets(example, ids, offsets, special)
            for first, end in spans:
                targets[first:end] = False
            kept.add(example, row, targets, spans)
    if not kept.tokens:
        reason = "no answer has any text"
        if kept.prompt_lengths:
            reason = f"the shortest prompt takes {min(kept.prompt_lengths)} tokens"
        raise UserError(
            f"{error_prefix}: none of the {len(rendered)} rows has anything to learn from within"
            f" --context_length {context_length} ({reason})"
        )
    return kept.join()


def cut_blocks(rendered: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """Yield the rows in blocks of at most BLOCK_ROWS, and BLOCK_CHARACTERS unless a single row has more."""
    block: list[Rendered] = []
    characters = 0
    for row in rendered:
        if block and (len(block) == BLOCK_ROWS or characters + len(row.text) > BLOCK_CHARACTERS):
            yield block
            block, characters = [], 0
        block.append(row)
        characters += len(row.text)
    if block:
        yield block


def _check_tokenizer(tokenizer, needs_eos: bool) -> None:
    """Raise UserError if a tokenizer has no offsets, or lacks an EOS that the rows need."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer cannot tell where a token lies in the text"
            " (no tokenizer.json)"
        )
    if tokenizer.eos_token_id is None and needs_eos:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no EOS token, so a model could not learn to stop"
        )


def describe_unknown_tokens(tokens: torch.Tensor, tokenizer) -> list[str]:
    """Return a list with one remark on tokens [N] that are the tokenizer's unknown one, or an empty list."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return []  # as in GPT-2, whose tokenizer knows every byte
    count = int((tokens == unknown).sum())
    if not count:
        return []
    return [
        f"data: {count:,} of {len(tokens):,} tokens are {tokenizer.unk_token}: the tokenizer has none for"
        " some characters, which the model neither sees nor learns to write"
    ]


def describe_joined_prompts(rendered: Sequence[Rendered], tokenizer) -> list[str]:
    """Return a list with one remark on prompts that end in other tokens when asked alone, or an empty list.

    A tokenizer may join the end of a prompt with the beginning of its answer: the space of `A: ` becomes part
    of the answer's first word. Whoever asks has no answer, and so asks with other tokens than the learned.
    """
    answered = [r for r in rendered if r.learned and r.last_answer_range[0]]
    sample = spread_sample(answered)
    ends = [end for one in sample if (end := _find_joined_end(drop_empty_answers(one, tokenizer), tokenizer))]
    if not ends:
        return []
    return [
        f"data: in {len(ends)} of {len(sample)} rows looked at, the tokenizer joins the end of the prompt,"
        f" {ends[0][0]!r}, with the beginning of the answer to {ends[0][1]!r}: asked without the answer, the"
        " model gets other tokens than it learned with"
    ]


def _find_joined_end(example: Rendered, tokenizer) -> tuple[str, str] | None:
    """Return (the prompt's last token, the token of training that stands there); None if they are equal."""
    if not example.learned:
        return None
    prompt = encode_prompt(
        example.text[: example.last_answer_range[0]], tokenizer, example.add_special_tokens
    )
    ((ids, _),) = encode(tokenizer, [example.text], example.add_special_tokens)
    i = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), None)
    return None if i is None else (tokenizer.decode(prompt[i:]), tokenizer.decode(ids[i]))


@dataclass(frozen=True)
class LearnedAnswer:
    """The learned tokens of an answer, which may hold characters before and after it.

    Attributes:
        ids: of the tokens.
        prompt_overlap: characters of the prompt in the first token.
        tail_overlap: characters of the text after the answer in the last token.
    """

    ids: list[int]
    prompt_overlap: str
    tail_overlap: str


def tokenize_last_answer(example: Rendered, tokenizer) -> LearnedAnswer:
    """Return the tokens of an example's last answer as training learns them. The example must have one."""
    example = dataclasses.replace(example, learned=[example.last_answer_range], last_answer_index=-1)
    ((ids, offsets),) = encode(tokenizer, [example.text], example.add_special_tokens)
    tokens, targets = _targets(example, ids, offsets, SpecialTokens.from_tokenizer(tokenizer))
    ((start, end),) = example.learned
    inside = [(begin, stop) for begin, stop in offsets if begin < end and stop > start]
    begin, stop = min((b for b, _ in inside), default=start), max((s for _, s in inside), default=end)
    return LearnedAnswer(tokens[targets].tolist(), example.text[begin:start], example.text[end:stop])


def decode_last_answer(example: Rendered, tokenizer, stop_ids: Collection[int]) -> str:
    """Return the last answer of an example, decoded from its learned tokens like a generated answer.

    stop_ids: token ids that end the answer; it is cut before the first of them.
    """
    learned = tokenize_last_answer(example, tokenizer)
    answer = normalize_answer(decode_answer(learned.ids, tokenizer, stop_ids, example.marker))
    # The first and last token of the answer may also have characters of the prompt and of the text after it.
    prompt, tail = learned.prompt_overlap.strip(), learned.tail_overlap.strip()
    return answer.removeprefix(prompt).removesuffix(tail).strip()


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of a tokenizer's BOS and EOS, and EOS as texts write it; None = it has none."""

    bos: int | None
    eos: int | None
    eos_text: str | None

    @classmethod
    def from_tokenizer(cls, tokenizer) -> SpecialTokens:
        return cls(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token)


def _targets(
    example: Rendered, ids: list[int], offsets: Offsets, special: SpecialTokens
) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens int32, whether each is a target), both [L], with an EOS if the row needs one."""
    starts, ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(ids)).reshape(-1, 2).T
    # Tokenizers with trim_offsets (Llama 3) report a token of spaces as empty, at its end. Its start is the
    # end of the token before it.
    starts = np.where(starts == ends, np.append(0, ends[:-1]), starts) if ids else starts
    targets = np.zeros(len(ids), dtype=bool)
    for start, end in example.learned:
        targets |= (starts < end) & (ends > start)
    tokens = np.asarray(ids, dtype=np.int32)
    if special.bos not in (None, special.eos):  # a token that is both is learned, as EOS
        targets &= tokens != special.bos
    if not (example.needs_eos and example.learned):
        return tokens, targets
    return _end_with_eos(example, tokens, targets, np.maximum(starts, ends), special)


def _end_with_eos(
    example: Rendered, tokens: np.ndarray, targets: np.ndarray, ends: np.ndarray, special: SpecialTokens
) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, targets) of `_targets` with one EOS token at the end, which is a target.

    If the answer ends with EOS as text, or the tokenizer adds one, that is the one: whitespace and more EOS
    after it are cut.
    """
    assert special.eos is not None and special.eos_text is not None
    start, first, text_end = example.learned[-1][0], None, len(example.text)
    for i in np.flatnonzero(tokens == special.eos)[::-1].tolist():
        text_after = example.text[ends[i] : text_end].replace(special.eos_text, "")
        if ends[i] <= start or text_after.strip():
            break
        first, text_end = i, ends[i]
    if first is None:
        return np.append(tokens, np.int32(special.eos)), np.append(targets, True)
    targets[first] = True
    return tokens[: first + 1], targets[: first + 1]
