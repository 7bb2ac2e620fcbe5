"""data/row_text.py: what --show_rows prints of an example."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data.formats import FORMATS
from data.row_text import describe_examples, mark_learned
from data.tokenizing import tokenize
from tests.helpers import small_tokenizers


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
    assert len(ids) == 2 and mark_learned(ids, [False, True], tokenizer) == "\ufffd[[\ufffd]]"
