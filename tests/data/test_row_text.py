"""data/row_text.py: what --show_rows prints of an example."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import groupby

import pytest

from data.formats import FORMATS, RenderContext
from data.row_text import (
    END_TOKENS,
    MAX_PART_CHARS,
    ExampleTokens,
    RowPart,
    describe_examples,
    mark_learned,
    record_examples,
    split_example,
)
from data.rows import MixedSet, join_sets
from data.tokenizing import tokenize
from tests.helpers import chat_templates, small_tokenizers


@pytest.mark.parametrize("make", [
    small_tokenizers.crossing, small_tokenizers.trimming, small_tokenizers.unigram,
    small_tokenizers.byte_fallback,
])  # fmt: skip
def test_the_marks_surround_the_learned_tokens(make):
    """Without them the text is the whole one; between them it is that of the learned tokens."""
    tokenizer = make()
    made = [FORMATS["qa"].render({"question": "Where?", "answer": answer}) for answer in ("Paris", "a b")]
    rendered = [replace(one, row_number=i) for i, one in enumerate(made, 1)]
    rows = tokenize(rendered, tokenizer, 100, "here")
    texts = describe_examples(rows, 5, tokenizer)
    assert len(texts) == 2
    for i, text in enumerate(texts):
        ids = rows.tokens[rows.starts[i] : rows.starts[i + 1]]
        learned = rows.learned[rows.starts[i] : rows.starts[i + 1]]
        head, _, shown = text.partition("\n")
        assert head == f"row {i + 1}: {len(ids)} tokens, {int(learned.sum())} of them learned"
        assert shown.replace("[[", "").replace("]]", "") == tokenizer.decode(ids)
        before, _, answer = shown.removesuffix("]]").partition("[[")
        assert before + answer == tokenizer.decode(ids) and answer.endswith("</s>")
        assert answer.strip() == tokenizer.decode(ids[learned]).strip() and before.startswith("<s>")


def test_a_character_that_is_learned_in_part():
    """Two tokens of one character: each part stands by itself, as the tokenizer shows it alone."""
    tokenizer = small_tokenizers.crossing()
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2 and mark_learned(ExampleTokens(ids, [False, True]), tokenizer) == "\ufffd[[\ufffd]]"


def test_special_tokens_are_parts_of_their_own():
    """Learned or not: those that end a turn are learned, too."""
    tokenizer = small_tokenizers.chat_tokenizer(chat_templates.CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    turns = [("user", "Hi"), ("assistant", "Yo"), ("user", "Bye"), ("assistant", "Ciao")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    rendered = FORMATS["chat"].render(row, RenderContext(tokenizer))
    rows = tokenize([rendered], tokenizer, 1000, "here")
    parts = split_example(ExampleTokens(rows.tokens.tolist(), rows.learned.tolist()), tokenizer)
    start, end = ("<|im_start|>", False, True), ("<|im_end|>", False, True)
    assert [(part.text, part.is_learned, part.is_special) for part in parts[4:]] == [
        start, ("user\nHi", False, False), end, ("\n", False, False),
        start, ("assistant\n", False, False), ("Yo", True, False), ("<|im_end|>", True, True),
        ("\n", False, False), start, ("user\nBye", False, False), end, ("\n", False, False),
        start, ("assistant\n", False, False), ("Ciao", True, False), ("<|im_end|>", True, True),
        ("\n", False, False),
    ]  # fmt: skip
    assert mark_learned(ExampleTokens(rows.tokens.tolist(), rows.learned.tolist()), tokenizer) == (
        rendered.text.replace("Yo<|im_end|>", "[[Yo<|im_end|>]]").replace(
            "Ciao<|im_end|>", "[[Ciao<|im_end|>]]"
        )
    )


HOSTILE = "[[x]] a]]b [i] </s> \\</s> \\[[ \\ end\\ \x1b[31m\u202e\r\x9b ]"


def read_marks(shown: str, specials: list[str]) -> list[tuple[str, bool, bool]]:
    """Read shown text back, as LEGEND says: (text, whether it is learned, whether it is a special token)."""
    parts, is_learned = [], False
    while shown:
        mark = next((m for m in ("[[", "]]", *specials) if shown.startswith(m)), "")
        if mark in ("[[", "]]"):
            is_learned = mark == "[["
        elif mark:
            parts.append((mark, is_learned, True))
        else:
            control = re.match(r"\\x(..)|\\u(....)", shown)
            escaped = next((t for t in specials if shown.startswith(f"\\{t}")), shown[1:2])
            if control:
                mark, text = control[0], chr(int(control[1] or control[2], 16))
            elif shown[0] == "\\":
                mark, text = f"\\{escaped}", escaped
            else:
                mark = text = shown[0]
            parts.append((text, is_learned, False))
        shown = shown.removeprefix(mark)
    return [("".join(t for t, *_ in group), *key) for key, group in groupby(parts, lambda part: part[1:])]


@pytest.mark.parametrize(
    ("question", "answer"), [(HOSTILE, "Yo"), ("Hi", HOSTILE), ("[", "]"), ("x[", "]x[[")]
)
def test_text_that_looks_like_marks(question, answer):
    """What is shown says which text, marks and special tokens there are, and no terminal obeys it."""
    tokenizer = small_tokenizers.chat_tokenizer(chat_templates.CHATML, "</s>")
    markers = {"<|im_start|>": 1, "<|im_end|>": 1}
    tokenizer.add_special_tokens({"additional_special_tokens": [*markers]})
    ids, learned = [tokenizer.bos_token_id], [False]
    for text, is_learned in ((question, False), (answer, True), (question, False)):
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids += [*encoded, tokenizer.eos_token_id]
        learned += [is_learned] * (len(encoded) + 1)
    shown = mark_learned(ExampleTokens(ids, learned), tokenizer)
    assert shown.isprintable()
    bos, eos = tokenizer.bos_token, "</s>"
    assert read_marks(shown, [bos, eos, *markers]) == [
        (bos, False, True), (question, False, False), (eos, False, True), (answer, True, False),
        (eos, True, True), (question, False, False), (eos, False, True),
    ]  # fmt: skip


def test_rows_of_each_set_are_recorded():
    """Three in all at least; those of a mixture name their set."""
    made = FORMATS["qa"].render({"question": "q", "answer": "a"})
    one, two = (
        tokenize([replace(made, row_number=i) for i in numbers], small_tokenizers.BYTES, 100, "here")
        for numbers in ((1, 2, 3), (4, 6))
    )
    rows = join_sets([one, two], [MixedSet("one", 3, 3), MixedSet("two", 2, 2)])
    recorded = record_examples(rows, small_tokenizers.BYTES)
    assert [(row.number, row.set) for row in recorded] == [(1, "one"), (2, "one"), (4, "two"), (6, "two")]


def test_recorded_rows_are_bounded():
    """The first three; of a long one both ends."""
    long = FORMATS["qa"].render({"question": "q" * 3000, "answer": "a" * 2000})
    rendered = [replace(long, row_number=i) for i in (2, 5, 7, 8)]
    rows = tokenize(rendered, small_tokenizers.BYTES, 10_000, "here")
    recorded = record_examples(rows, small_tokenizers.BYTES)
    assert [row.number for row in recorded] == [2, 5, 7]
    ids = rows.tokens[: rows.starts[1]].tolist()
    for row in recorded:
        assert (row.tokens, row.learned) == (len(ids), 2001)
        shown = ["".join(part.text for part in end) for end in (row.head, row.tail)]
        ends = ids[:END_TOKENS], ids[-END_TOKENS:]
        assert shown == [small_tokenizers.BYTES.decode(end) for end in ends]
        assert row.omitted == len(ids) - 2 * END_TOKENS
    short = tokenize([FORMATS["completion"].render({"text": "ab"})], small_tokenizers.BYTES, 100, "here")
    (row,) = record_examples(short, small_tokenizers.BYTES)
    assert row.head == [
        RowPart("<s>", False, True),
        RowPart("ab", True, False),
        RowPart("</s>", True, True),
    ]
    assert (row.omitted, row.tail) == (0, ())


def test_a_token_of_a_long_text_is_clipped():
    tokenizer = small_tokenizers.chat_tokenizer(chat_templates.CHATML)
    tokenizer.add_tokens(["x" * 10_000])
    rows = tokenize([FORMATS["completion"].render({"text": "x" * 10_000})], tokenizer, 100, "here")
    (row,) = record_examples(rows, tokenizer)
    assert max(len(part.text) for part in row.head) == MAX_PART_CHARS
