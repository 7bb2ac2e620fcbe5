"""data/tokenizing.py: which tokens are targets (exactness rule 6 of the design)."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.make_checkpoint import byte_tokenizer
from data.encoding import encode_prompt
from data.formats import FORMATS, GUANACO_MARKERS, QA, RenderContext, Rendered
from data.tokenizing import (
    BLOCK_CHARACTERS,
    cut_blocks,
    describe_joined_prompts,
    describe_unknown_tokens,
    tokenize,
)
from options.errors import UserError
from tests.helpers import small_tokenizers
from tests.helpers.products import slow
from tests.helpers.small_tokenizers import BYTES


def qa(answer: str, question: str = "What?") -> Rendered:
    return FORMATS["qa"].render({"question": question, "answer": answer})


def completion(text: str) -> Rendered:
    return FORMATS["completion"].render({"text": text})


def guanaco(text: str, markers=GUANACO_MARKERS) -> Rendered:
    return FORMATS["guanaco"].render({"text": text}, RenderContext(None, markers))


def learned_pieces(rendered: Rendered, tokenizer, context_length: int = 1000) -> list[str]:
    rows = tokenize([rendered], tokenizer, context_length, "here")
    return tokenizer.convert_ids_to_tokens(rows.tokens[rows.learned].tolist())


# tokenizer, its text, the learned pieces
STRADDLING = {
    "line break + letters": ("crossing", qa("Paris"), ["ĊParis", "</s>"]),
    "line break + letters, Unigram": ("unigram", qa("Paris"), ["\nPar", "is", "</s>"]),
    "no straddling": ("byte_fallback", qa("Paris"), ["P", "aris", "</s>"]),
    "space in the marker": (
        "crossing", guanaco("Human: Paris Bot: Paris", ["Human: ", "Bot: "]), ["ĠP", "aris", "</s>"]),
    "space in the marker, trimmed": (
        "trimming", guanaco("Human: Paris Bot: Paris", ["Human: ", "Bot: "]), ["ĠParis", "</s>"]),
    "space in the marker, Unigram": (
        "unigram", guanaco("Human: Paris Bot: Paris", ["Human: ", "Bot: "]), ["▁Paris", "</s>"]),
    "white space in front": (
        "crossing", guanaco("### Assistant: \nPar### Human: Paris"), ["Ġ", "ĊP", "ar"]),
    "end straddles": (  # the turn ends within a token, which is learned whole
        "byte_fallback", guanaco("Bot: arisHuman: no", ["isHuman:", "Bot:"]), ["▁", "aris"]),
}  # fmt: skip


@pytest.mark.parametrize("case", STRADDLING)
def test_a_token_with_a_character_of_the_answer_is_learned(case):
    name, rendered, pieces = STRADDLING[case]
    assert learned_pieces(rendered, getattr(small_tokenizers, name)()) == pieces


KINDS = ("crossing", "trimming", "ending", "unigram", "byte_fallback")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "answer", ["Paris", "4", "é", "日本", "🙂 is 👩‍👩‍👧", " Paris, ", "  x    y    ", "\n\nP", "a </s> b"]
)
def test_the_answer_is_learned_to_the_last_byte(kind, answer):
    """Also where one character takes several tokens, and where a token is nothing but spaces."""
    tokenizer = getattr(small_tokenizers, kind)()
    rendered = qa(answer, question="é 🙂 Paris")
    rows = tokenize([rendered], tokenizer, 1000, "here")
    whole = tokenizer(rendered.text)["input_ids"]
    expected = whole if whole[-1] == tokenizer.eos_token_id else [*whole, tokenizer.eos_token_id]
    assert rows.tokens.tolist() == expected
    first = int(rows.learned.int().argmax())
    assert rows.learned[first:].all()  # nothing of the answer or EOS is left out ...
    prompt = tokenizer.decode(rows.tokens[:first], skip_special_tokens=True)
    assert rendered.text.startswith(prompt)  # ... and what is left out is prompt, but for a straddling token
    assert 0 <= rendered.learned[0][0] - len(prompt) <= 1


def test_nothing_but_whole_texts_is_tokenized():
    """A prompt's own tokens are others than those it has before an answer: a mask must not come from them."""
    tokenizer, seen = small_tokenizers.crossing(), []

    class Spy:
        is_fast = True

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **options):
            seen.extend(texts)
            return tokenizer(texts, **options)

    rendered = [qa("Paris"), qa("Peru is big")]
    tokenize(rendered, Spy(), 100, "here")
    assert seen == [r.text for r in rendered]
    prompt = tokenizer(rendered[0].text[: rendered[0].learned[0][0]])["input_ids"]
    assert tokenizer(rendered[0].text)["input_ids"][: len(prompt)] != prompt


def test_an_eos_that_the_tokenizer_writes_is_learned_once_and_only_after_an_answer():
    tokenizer = small_tokenizers.ending()
    rows = tokenize([qa("x"), guanaco("### Assistant: x### Human: y")], tokenizer, 100, "here")
    answer, dialogue = (slice(*pair) for pair in pairwise(rows.starts.tolist()))
    assert tokenizer.decode(rows.tokens[answer][rows.learned[answer]]) == "x</s>"
    assert tokenizer.decode(rows.tokens[dialogue][rows.learned[dialogue]]) == " x"
    assert rows.tokens[dialogue][-1] == tokenizer.eos_token_id


def test_unknown_characters_are_told():
    """A tokenizer without bytes for them: the line counts what transformers makes <unk>."""
    known = Tokenizer(models.WordLevel({"<unk>": 0, "it": 1, "is": 2, "ok": 3}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    for text, count in (("it is ok", 0), ("it is 東京", 1), ("北京 is 東京 ok", 2)):
        rows = tokenize([completion(text)], tokenizer, 100, "here")
        ids = tokenizer(text)["input_ids"]
        assert rows.tokens[:-1].tolist() == ids and ids.count(0) == count
        remarks = describe_unknown_tokens(rows.tokens, tokenizer)
        assert len(remarks) == bool(count)
        assert all(f"data: {count} of {len(ids) + 1} tokens are <unk>: " in remark for remark in remarks)
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2's, which knows every byte
    assert describe_unknown_tokens(rows.tokens, tokenizer) == []


def test_a_prompt_that_the_tokenizer_joins_with_the_answer_is_told():
    """Counted are the rows whose prompt, tokenized alone, is not how their tokens begin."""
    tokenizer = small_tokenizers.crossing()
    separate, joined = Rendered("Q: x A:", [(6, 7)]), Rendered("Q: x A: Paris", [(8, 13)])
    for rows in ([separate], [joined], [separate, joined, joined, Rendered("plain", [(0, 5)])]):
        count = 0
        for row in rows:
            prompt = tokenizer(row.text[: row.learned[0][0]])["input_ids"]
            count += tokenizer(row.text)["input_ids"][: len(prompt)] != prompt
        remarks = describe_joined_prompts(rows, tokenizer)
        assert len(remarks) == bool(count) == (joined in rows)
        asked = [r for r in rows if r.learned[0][0]]
        assert all(f"in {count} of {len(asked)} rows looked at" in remark for remark in remarks)
        assert all("' ', with the beginning of the answer to ' P'" in remark for remark in remarks)


INST = "[INST] a [/INST] b</s><s>[INST] c [/INST] d"
# the row, the text whose tokens it must have, the text of those that are learned
ONE_BOS = {
    "text": (completion("<s>Paris is"), "<s>Paris is</s>", "Paris is</s>"),
    "text, whitespace in front": (completion(" \n<s>Paris is"), "<s>Paris is</s>", "Paris is</s>"),
    "text, twice": (completion("<s> <s>Paris is"), "<s>Paris is</s>", "Paris is</s>"),
    "text, closed": (completion("<s>Paris is</s>"), "<s>Paris is</s>", "Paris is</s>"),
    "text of turns": (completion(f"<s>{INST}"), f"<s>{INST}</s>", f"{INST.replace('<s>', '')}</s>"),
    "text of turns without the first": (
        completion(INST), f"<s>{INST}</s>", f"{INST.replace('<s>', '')}</s>"),
    "prompt": (qa("is", question="<s>a"), f"<s>{QA.format(question='<s>a')}is</s>", "is</s>"),
    "answer": (qa("<s>is"), f"<s>{QA.format(question='What?')}is</s>", "is</s>"),
    "answer of a dialogue": (
        guanaco("### Human: a### Assistant:<s>b### Human: c### Assistant:<s>d"),
        "<s>### Human: a### Assistant:b### Human: c### Assistant:d</s>", "bd</s>"),
    "conversation": (
        Rendered("<s>user a model b</s>", [(15, 21)], needs_eos=False, add_special_tokens=False),
            "<s>user a model b</s>", " b</s>"),
    "conversation, written twice": (
        Rendered("<s><s>user a model b</s>", [(18, 24)], needs_eos=False, add_special_tokens=False),
            "<s>user a model b</s>", " b</s>"),
    "EOS": (qa("is</s>"), f"<s>{QA.format(question='What?')}is</s>", "is</s>"),
    "EOS, a line break": (qa("is</s>\n"), f"<s>{QA.format(question='What?')}is</s>", "is</s>"),
    "EOS, twice": (qa("is</s> </s>\n\n"), f"<s>{QA.format(question='What?')}is</s>", "is</s>"),
    "BOS at the end": (qa("is<s>"), f"<s>{QA.format(question='What?')}is</s>", "is</s>"),
    "EOS, BOS": (qa("is</s> <s>\n"), f"<s>{QA.format(question='What?')}is</s>", "is</s>"),
    "EOS, BOS, EOS": (qa("is</s><s></s>"), f"<s>{QA.format(question='What?')}is</s>", "is</s>"),
    "text, EOS, BOS": (completion("<s>Paris is</s><s>"), "<s>Paris is</s>", "Paris is</s>"),
    "EOS within": (qa("is</s>so"), f"<s>{QA.format(question='What?')}is</s>so</s>", "is</s>so</s>"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
@pytest.mark.parametrize("case", ONE_BOS)
def test_special_tokens_in_the_data(case, kind):
    """Against transformers' tokens of a text that has each of them once, and to which none are added."""
    tokenizer = BYTES if kind == "bytes" else getattr(small_tokenizers, kind)()
    rendered, text, learned = ONE_BOS[case]
    rows = tokenize([rendered], tokenizer, 1000, "here")
    assert rows.tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    found = tokenizer.convert_ids_to_tokens(rows.tokens[1:][rows.learned[1:]].tolist())
    assert "<s>" not in found and found.count("</s>") == learned.count("</s>")
    assert tokenizer.convert_tokens_to_string(found).replace(" ", "") == learned.replace(" ", "")


def test_an_answer_of_nothing_but_special_tokens_is_empty():
    rendered = [qa("<s>"), qa("</s>"), qa("<s> </s>\n"), qa("is")]
    assert tokenize(rendered, BYTES, 100, "here").row_numbers.tolist() == [0]
    assert tokenize(rendered, BYTES, 100, "here").dropped == 3


@pytest.mark.parametrize("rendered, count", [
    (completion("<s>" * 200_000 + "Paris"), len("Paris") + 2),
    (qa("Paris" + "</s><s> \n" * 200_000), len(QA.format(question="What?") + "Paris") + 2),
    *slow([(qa("Paris" + "</s> \n" * 200_000), len(QA.format(question="What?") + "Paris") + 2)]),
])  # fmt: skip
def test_special_tokens_in_great_number_take_little_time(rendered, count):
    """A hundred times as many take about a hundred times as long, not ten thousand times."""
    began = time.monotonic()
    rows = tokenize([rendered], BYTES, 1000, "here")
    assert len(rows.tokens) == count and time.monotonic() - began < 10


@pytest.mark.parametrize("text", ["<s>", "</s>", "<s></s>", " <s> <s>\n", "</s> </s>"])
def test_a_text_of_nothing_but_special_tokens_is_dropped(text):
    """Neither BOS nor the EOS behind it is learned: as an empty text teaches nothing."""
    rows = tokenize([completion(text), completion("is")], BYTES, 100, "here")
    assert rows.dropped == tokenize([completion(""), completion("is")], BYTES, 100, "here").dropped == 1
    assert rows.tokens.tolist() == BYTES("<s>is</s>", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("empty", ["<s>", "</s>", "<s></s>"])
def test_an_earlier_answer_of_nothing_but_special_tokens_is_not_learned(empty):
    assert learned_pieces(guanaco(f"### Human: a### Assistant:{empty}### Human: c### Assistant:d"),
        BYTES) == [
        "d", "</s>"]  # fmt: skip
    rows = tokenize([guanaco(f"### Human: a### Assistant:{empty}### Human: c"), qa("is")], BYTES, 100, "here")
    assert rows.dropped == 1


def test_one_token_for_bos_and_eos():
    """As in GPT-2: it is learned at the end of an answer or a document, but never as a row's first token."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizers.ending().backend_tokenizer, bos_token="</s>", eos_token="</s>"
    )
    tokenizer.add_bos_token, tokenizer.add_eos_token = True, False
    end = tokenizer.eos_token_id
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Paris", "is"))
    for text in ("Paris</s>is", "</s>Paris</s>is", "</s>Paris</s>is</s>\n"):
        rows = tokenize([completion(text)], tokenizer, 100, "here")
        assert rows.tokens.tolist() == [end, *a, end, *b, end]
        assert rows.learned[1:].all()


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_a_prompt_has_the_tokens_of_training(kind):
    """Up to a line break, which may be one token with what follows."""
    tokenizer = BYTES if kind == "bytes" else getattr(small_tokenizers, kind)()
    for text in ("<s>a b is", " <s>a b is", "a b is", "<s>a</s><s>b is", "a b</s>is"):
        trained = tokenize([completion(text)], tokenizer, 100, "here").tokens.tolist()
        asked = encode_prompt(text.removesuffix(" is"), tokenizer, add_special_tokens=True)
        assert (
            asked == trained[: len(asked)]
            and asked.count(tokenizer.bos_token_id) == text.strip()[1:].count("<s>") + 1
        )


@pytest.mark.parametrize(
    "room, learned, cut", [(7, "answer</s>", 0), (6, "answer", 1), (5, "answe", 1), (1, "a", 2)]
)
def test_a_cut_answer_has_no_eos(room, learned, cut):
    """room: tokens that context_length leaves for the answers "answer" and "a"."""
    rows = tokenize([qa("answer"), qa("a"), qa("")], BYTES, 1 + len(qa("").text) + room, "here")
    first = slice(*rows.starts[:2].tolist())
    assert BYTES.decode(rows.tokens[first][rows.learned[first]]) == learned
    assert (len(rows), rows.dropped, rows.cut) == (2, 1, cut)


def test_examples_without_a_target_are_dropped_and_counted():
    long = qa("never reached", question="x" * 200)
    rows = tokenize([long, qa("yes"), qa(" "), long], BYTES, 100, "here")
    assert (len(rows), rows.dropped, rows.cut) == (1, 3, 0)
    assert BYTES.decode(rows.tokens[rows.learned]) == "yes</s>"
    with pytest.raises(
        UserError, match=r"^here: none of the 1 rows .*--context_length 100 .*shortest prompt takes 2\d\d"
    ):
        tokenize([long], BYTES, 100, "here")
    with pytest.raises(UserError, match="no answer has any text"):
        tokenize([qa(""), qa(" ")], BYTES, 100, "here")


def test_a_first_token_is_no_target():
    """Nothing predicts it: without BOS, a completion of one token that is cut there teaches nothing."""
    one = Rendered("ab", [(0, 1)], needs_eos=False, add_special_tokens=False)
    with pytest.raises(UserError, match="none of the 1 rows"):
        tokenize([one], BYTES, 100, "here")
    rows = tokenize([one, Rendered("abc", [(0, 3)], add_special_tokens=False)], BYTES, 100, "here")
    assert (len(rows), rows.dropped) == (1, 1)
    assert rows.learned.tolist() == [True] * 4
    assert rows.targets().tolist() == [3]


def test_tokenizers_that_cannot_be_used():
    no_eos = byte_tokenizer()
    no_eos.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        tokenize([qa("x")], no_eos, 100, "here")
    assert len(tokenize([guanaco("### Assistant: x### Human: y")], no_eos, 100, "here")) == 1  # needs none

    class Slow:
        is_fast, name_or_path = False, "models/slow"

    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        tokenize([qa("x")], Slow(), 100, "here")


def test_long_rows_are_tokenized_a_few_at_a_time():
    """A block of 1,000 rows of whole books would take tens of GB."""
    short, book = Rendered("a" * 10, [(0, 10)]), Rendered("b" * (BLOCK_CHARACTERS + 1), [(0, 10)])
    rows = [short] * 1001 + [book, short, book]
    blocks = list(cut_blocks(rows))
    assert [len(block) for block in blocks] == [1000, 1, 1, 1, 1]
    assert [row for block in blocks for row in block] == rows
    assert list(cut_blocks([])) == []
