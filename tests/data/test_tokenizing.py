"""data/tokenizing.py: which tokens are targets (exactness rule 6 of the design), and how rows are dealt to steps."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.make_checkpoint import byte_tokenizer
from data import examples
from data.batches import StepSampler, rounded
from data.encoding import prompt_ids
from data.formats import FORMATS, GUANACO_MARKERS, QA, RenderContext, Rendered
from data.rows import IGNORE, TokenizedRows
from data.tokenizing import prepare, tokenize
from options.errors import UserError
from tests.helpers import chat_templates, small_tokenizers
from tests.helpers.small_tokenizers import BYTES
from tests.helpers.token_rows import SIZES, assert_target_positions, expected, make_token_rows


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
        Rendered("<s>user a model b</s>", [(15, 21)], ends=False, special=False), "<s>user a model b</s>", " b</s>"),
    "conversation, written twice": (
        Rendered("<s><s>user a model b</s>", [(18, 24)], ends=False, special=False), "<s>user a model b</s>", " b</s>"),
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
    assert tokenize(rendered, BYTES, 100, "here").numbers.tolist() == [0]
    assert tokenize(rendered, BYTES, 100, "here").dropped == 3


@pytest.mark.parametrize("rendered, count", [
    (completion("<s>" * 200_000 + "Paris"), len("Paris") + 2),
    (qa("Paris" + "</s><s> \n" * 200_000), len(QA.format(question="What?") + "Paris") + 2),
    (qa("Paris" + "</s> \n" * 200_000), len(QA.format(question="What?") + "Paris") + 2),
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
    assert learned_pieces(guanaco(f"### Human: a### Assistant:{empty}### Human: c### Assistant:d"), BYTES) == [
        "d", "</s>"]  # fmt: skip
    rows = tokenize([guanaco(f"### Human: a### Assistant:{empty}### Human: c"), qa("is")], BYTES, 100, "here")
    assert rows.dropped == 1


def test_one_token_for_bos_and_eos():
    """As GPT-2 has it: it is learned where it closes an answer or a document, though never as a row's first."""
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
        asked = prompt_ids(text.removesuffix(" is"), tokenizer, special=True)
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
    one = Rendered("ab", [(0, 1)], ends=False, special=False)
    with pytest.raises(UserError, match="none of the 1 rows"):
        tokenize([one], BYTES, 100, "here")
    rows = tokenize([one, Rendered("abc", [(0, 3)], special=False)], BYTES, 100, "here")
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


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prepare_names_the_row_that_no_tokenizer_takes(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "half a smile: \ud83d"}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*surrogates not allowed"):
        prepare(file, "auto", -1, 100, BYTES)


def test_prepare_takes_the_format_that_the_user_names(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "### Human: a### Assistant: b"}])
    for name, learned in (("auto", " b</s>"), ("completion", "### Human: a### Assistant: b</s>")):
        rows = prepare(file, name, -1, 100, BYTES)
        assert BYTES.decode(rows.tokens[rows.learned]) == learned
    with pytest.raises(UserError, match=r"a\.jsonl:1: nothing in column instruction, output"):
        prepare(file, "alpaca", -1, 100, BYTES)


def test_row_numbers_are_the_datasets_own(tmp_path):
    """Rows that are dropped are counted."""
    rows = [{"question": "a", "answer": text} for text in ("b", "", "c", " ", "d")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared = prepare(str(tmp_path / "rows.jsonl"), "auto", -1, 100, byte_tokenizer())
    assert prepared.dropped == 2 and prepared.numbers.tolist() == [1, 3, 5]


def test_dummy_fills_the_context_to_the_last_token():
    rows = prepare("dummy", "auto", 3, 333, BYTES)
    assert rows.lengths().tolist() == [333] * 3
    assert rows.cut == 3


def test_a_large_chat_file_is_rendered_by_several_processes(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_templates.QWEN3
    turns = [("user", "Hi"), ("assistant", "Yo"), ("user", "Bye"), ("assistant", "Ciao")]
    rows = [{"messages": [{"role": r, "content": f"{t} {i}"} for r, t in turns]} for i in range(2001)]
    file = write(tmp_path / "a.jsonl", rows)
    results = set()
    monkeypatch.setattr(examples._Rendering, "__call__", _recorded(examples._Rendering.__call__, tmp_path))
    for cores in (3, 1):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        results.add(prepare(file, "auto", -1, 512, tokenizer).tokens.numpy().tobytes())
    assert len(results) == 1  # the same rows in the same order
    assert len(list(tmp_path.glob("worker-*"))) > 2  # several, and this process with one core

    rows[1500]["messages"][0] = {"role": "user", "content": None}
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    with pytest.raises(UserError, match=r"a\.jsonl:1501: messages must be"):
        prepare(write(tmp_path / "a.jsonl", rows), "auto", -1, 512, tokenizer)


def _recorded(render, folder):
    def recording(self, numbers):
        (folder / f"worker-{os.getpid()}").touch()
        return render(self, numbers)

    return recording


def dying(numbers: range):
    if 400 in numbers:
        os.kill(os.getpid(), signal.SIGKILL)
    return examples._held(numbers)


def test_a_data_worker_that_is_killed(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 2000)
    monkeypatch.setattr(examples, "_render_held", dying)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(
        UserError, match="one of 2 processes that render its rows was killed; out of host memory"
    ):
        prepare(str(tmp_path / "rows.jsonl"), "auto", -1, 100, tokenizer)


def unpadded(batch) -> dict[tuple, tuple]:
    """{tokens: targets} of a batch's rows, which must be padded on the right only. Rows of nothing else are not
    rows."""
    table = {}
    lengths = (batch.ids != 0).sum(1).tolist()
    assert batch.ids.shape == batch.targets.shape
    for ids, targets, length in zip(batch.ids.tolist(), batch.targets.tolist(), lengths, strict=True):
        assert ids[length:] == [0] * (len(ids) - length)
        assert targets[length:] == [IGNORE] * (len(ids) - length)
        if length:
            table[tuple(ids[:length])] = tuple(targets[:length])
    return table


def run(rows, batch_size, accumulation, world, seed=42, epochs=1):
    """[[the step of each rank] for each step]."""
    samplers = [StepSampler(rows, batch_size, accumulation, r, world, seed) for r in range(world)]
    steps = list(zip(*(s.steps(epochs) for s in samplers), strict=True))
    assert len(steps) == epochs * samplers[0].steps_per_epoch()
    return steps


def real(step) -> dict[tuple, tuple]:
    """{tokens: targets} of all ranks' rows in a step, each once; batches without targets left out."""
    batches = [b for part in step for b in part.batches if (b.targets != IGNORE).any()]
    tables = [unpadded(b) for b in batches]
    merged = {ids: targets for table in tables for ids, targets in table.items()}
    assert len(merged) == sum(map(len, tables))
    return merged


@pytest.mark.parametrize("size", SIZES)
def test_an_epoch_has_every_row_once_with_its_targets(size):
    rows = make_token_rows(size[0])
    steps = run(rows, *size[1:])
    tables = [real(step) for step in steps]
    assert sum(map(len, tables)) == size[0]
    assert {ids: targets for table in tables for ids, targets in table.items()} == expected(rows)
    for step, table in zip(steps, tables, strict=True):
        tokens = sum(map(len, table))
        targets = sum(t != IGNORE for values in table.values() for t in values)
        assert {(part.n_tokens, part.n_targets) for part in step} == {(tokens, targets)}
        for batches in zip(*(part.batches for part in step), strict=True):  # the parts of a micro-batch
            (shape,) = {b.ids.shape for b in batches}  # collectives need all ranks alike
            longest = max(len(ids) for b in batches for ids in unpadded(b))
            assert shape == (max(len(unpadded(b)) for b in batches), longest)
        assert all(len(b.ids) <= size[1] for part in step for b in part.batches)


def test_lines_of_many_lengths_have_few_widths():
    """None shorter than its rows, none more than a sixteenth longer, none beyond the longest row."""
    assert [rounded(n) for n in (1, 31, 32, 33, 135, 136, 137, 2047, 2049)] == [
        *(1, 31, 32, 34, 136, 136, 144),
        *(2048, 2176),
    ]
    lengths = range(100, 2000, 7)
    rows = TokenizedRows(
        torch.arange(1, sum(lengths) + 1, dtype=torch.int32),
        torch.ones(sum(lengths), dtype=torch.bool),
        torch.tensor([0, *itertools.accumulate(lengths)]),
        *(0, 0),
        torch.arange(1, len(lengths) + 1),
    )
    widths = [step[0].batches[0].ids.shape[1] for step in run(rows, 1, 1, 1)]
    assert len(lengths) == len(widths) == 272 and len(set(widths)) <= 72
    for width, length in zip(sorted(widths), lengths, strict=True):
        assert length <= width <= min(length * 17 / 16, lengths[-1])


@pytest.mark.parametrize("count", [5, 16, 21])
def test_a_step_has_the_same_rows_however_it_is_split(count):
    rows = make_token_rows(count)
    splits = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2), (1, 2, 4)]
    runs = [run(rows, *split, epochs=2) for split in splits]
    for step in itertools.chain(*runs):
        assert_target_positions(step)
    runs = [[real(step) for step in steps] for steps in runs]
    assert all(other == runs[0] for other in runs[1:])


def test_a_rank_without_rows_gets_a_batch_without_targets():
    (step,) = run(make_token_rows(3), 2, 1, 3)
    idle = step[2].batches[0]
    assert (idle.targets == IGNORE).all()
    assert idle.ids.numel() > 0
    assert_target_positions(step)
    assert step[2].n_targets == step[0].n_targets > 0


def test_the_order_follows_from_seed_and_epoch():
    def orders(seed):
        sampler = StepSampler(make_token_rows(40), 4, 2, 0, 2, seed)
        return [torch.cat([step for step, _ in sampler.deal(epoch)]).tolist() for epoch in range(3)]

    first = orders(1)
    assert first == orders(1)
    assert len({tuple(order) for order in first + orders(2)}) == 6
    assert all(sorted(order) == list(range(40)) for order in first)


def test_epochs_are_counted_in_steps():
    epochs = [step[0].epoch for step in run(make_token_rows(10), 2, 2, 1, epochs=2)]
    torch.testing.assert_close(epochs, [1 / 3, 2 / 3, 1.0, 4 / 3, 5 / 3, 2.0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_padding_share(size):
    rows = make_token_rows(size[0])
    batches = [b for step in run(rows, *size[1:]) for part in step for b in part.batches]
    batches = [b for b in batches if (b.targets != IGNORE).any()]
    share = sum(int((b.ids == 0).sum()) for b in batches) / sum(b.ids.numel() for b in batches)
    for rank in range(size[3]):
        assert StepSampler(rows, *size[1:3], rank, size[3], 42).padding_share() == pytest.approx(
            share, abs=1e-12
        )
