"""data/answers.py: what the data say and what a model generates become texts that can be compared."""

from __future__ import annotations

import unicodedata

import pytest

from data.answers import cut_repetition, decode_answer, normalize_answer
from data.evaluation_sets import make_row_prompt
from data.formats import ALPACA, FORMATS, GUANACO_MARKERS, RenderContext, Rendered
from tests.helpers import chat_templates, small_tokenizers
from tests.helpers.small_tokenizers import BYTES, chat_tokenizer

ANSWER = "It is Paris, of course."
# template, the tokenizer's EOS, its other special tokens, the tokens that end an answer
TEMPLATES = {
    "Qwen3": (chat_templates.QWEN3, "<|im_end|>", ["<|im_start|>"], ["<|im_end|>"]),
    "Llama 3.1": (
        chat_templates.LLAMA3, "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
        ["<|eot_id|>", "<|end_of_text|>"]),
    "ChatML over another EOS": (
        chat_templates.CHATML, "</s>", ["<|im_start|>", "<|im_end|>"], ["</s>", "<|im_end|>"]),
    "Gemma": (chat_templates.GEMMA, "</s>", ["<start_of_turn>", "<end_of_turn>"], ["</s>", "<end_of_turn>"]),
    "Llama 2": (chat_templates.LLAMA2, "</s>", [], ["</s>"]),
    "Mistral": (chat_templates.MISTRAL, "</s>", [], ["</s>"]),
}  # fmt: skip


def tokenizer_of(name: str):
    template, eos, special, stop_ids = TEMPLATES[name]
    tokenizer = chat_tokenizer(template, eos)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(["<think>", "</think>"])  # not special, as Qwen3's are not
    return tokenizer, tokenizer.convert_tokens_to_ids(stop_ids)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [1, 2])
def test_the_answer_of_a_conversation(name, turns):
    """A model that generates the text of transformers' template after its prompt gives the reference."""
    tokenizer, stop_ids = tokenizer_of(name)
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": ANSWER}] * turns
    prompt = make_row_prompt(
        FORMATS["chat"].render({"messages": messages}, RenderContext(tokenizer, empty_thinking="learn")),
        tokenizer,
        999,
        stop_ids,
    )
    assert prompt.answer == ANSWER
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    shown = tokenizer.apply_chat_template(messages)["input_ids"]
    assert prompt.ids == asked == shown[: len(asked)]
    made = shown[len(asked) :] + tokenizer("and so on", add_special_tokens=False)["input_ids"]
    assert normalize_answer(decode_answer(made, tokenizer, stop_ids)) == ANSWER
    cut = shown[len(asked) :][:-9]
    assert normalize_answer(decode_answer(cut, tokenizer, stop_ids)) == normalize_answer(
        tokenizer.decode(cut, skip_special_tokens=True)
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<think>\n\n</think>\n\nParis", "Paris"),
        ("\n<think></think> Paris ", "Paris"),
        ("\n</think>\n\nParis", "Paris"),
        ("<think>\nhm\n</think>\n\nParis", "<think>\nhm\n</think>\n\nParis"),
        ("Paris <think></think>", "Paris <think></think>"),
        (" \n", ""),
    ],
)
def test_an_empty_thought_is_no_part_of_an_answer(text, shown):
    assert normalize_answer(text) == shown


@pytest.mark.parametrize(("text", "shown"), [
    ("goose " * 30, "goose goose goose ... (repeated)"),
    ("A goose" + " goose" * 30 + " goo", "A goose goose goose ... (repeated)"),  # its last word is cut
    ("It sat. " * 11 + "Then it left.", "It sat. It sat. It sat. ... (repeated) Then it left."),
    ("a\n" * 49 + "b c" + " c" * 47, "a\na\na ... (repeated)\nb c c c ... (repeated)"),
    ("0 " * 40, "0 " * 40),  # not wider than a line
    ("0 " * 41, "0 0 0 ... (repeated)"),
    ("A line of twenty ... " * 5, "A line of twenty ... " * 5),
    ("!" * 81, "!!! ... (repeated)"),
    ("0" * 80, "0" * 80),
    ("Ja " + "nein" * 30 + "ne", "Ja neinneinnein ... (repeated)"),
    ("\u7684" * 41 + "\u3002 ok", "\u7684\u7684\u7684 ... (repeated)\u3002 ok"),  # wide characters
    ("\u7684" * 40, "\u7684" * 40),
    ("\u6211\u4e0d\u77e5\u9053\uff0c" * 9, "\u6211\u4e0d\u77e5\u9053\uff0c" * 3 + " ... (repeated)"),
    ("x" * 9 + "ab" * 90 + " " + "!" * 90, "x" * 9 + "ababab ... (repeated) !!! ... (repeated)"),
    ("1 2 3 1 2 3\n", "1 2 3 1 2 3\n"),
    (" ", " "),
])  # fmt: skip
def test_what_a_terminal_shows_of_repetitions(text, shown):
    assert cut_repetition(text) == shown


def dialogue(text: str, markers=GUANACO_MARKERS) -> Rendered:
    return FORMATS["guanaco"].render({"text": text}, RenderContext(None, markers))


# tokenizer, the row, what a model that learned it generates behind its prompt, the answer
ROWS = {
    "EOS": (BYTES, FORMATS["alpaca"].render({"instruction": "Do.", "output": " Paris is "}), "Paris is</s>",
        "Paris is"),
    "EOS in the data": (BYTES, FORMATS["qa"].render({"question": "A", "answer": "is</s>\n"}), "is</s>", "is"),
    "BOS in the data": (BYTES, FORMATS["qa"].render({"question": "A", "answer": "<s>is"}), "is</s>", "is"),
    "SentencePiece": (
        small_tokenizers.unigram(), FORMATS["qa"].render({"question": "A", "answer": "Paris"}), "Paris</s>",
            "Paris"),
    "dialogue": (BYTES, dialogue("### Human: a### Assistant: b c"), " b c</s>", "b c"),
    "dialogue that goes on": (
        BYTES, dialogue("### Human: a### Assistant: b c### Human: d"), " b c### Human: e### Assistant: f",
            "b c"),
    "the answer's last token holds the next marker": (
        small_tokenizers.byte_fallback(), dialogue("Bot: arisHuman: no", ("isHuman:", "Bot:")),
            " arisHuman: x", "ar"),
    "the answer's first token holds the marker's colon": (
        small_tokenizers.colon(), dialogue("Me: a Bot:Paris", ("Me:", "Bot:")), "Paris</s>", "Paris"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_the_answer_of_a_row(case):
    tokenizer, rendered, generated, answer = ROWS[case]
    stop_ids = [tokenizer.eos_token_id]
    prompt = make_row_prompt(rendered, tokenizer, 999, stop_ids)
    made = tokenizer(generated, add_special_tokens=False)["input_ids"]
    assert (
        prompt.answer == normalize_answer(decode_answer(made, tokenizer, stop_ids, prompt.marker)) == answer
    )


def test_a_decoded_answer_is_transformers_own():
    """The text is one that the tokenizer normalizes, and has characters that it does not know."""
    tokenizer = small_tokenizers.unigram()
    row = {
        "instruction": "Do.",
        "output": "Caf\u0065\u0301 \u65e5\u672c \u0928\u092e\u0938\u094d\u0924\u0947",
    }
    prompt = make_row_prompt(FORMATS["alpaca"].render(row), tokenizer, 999, [tokenizer.eos_token_id])
    ids = tokenizer(ALPACA.format(instruction="Do.") + row["output"], add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert whole.partition("### Response:\n")[2] == row["output"]
    assert prompt.answer == unicodedata.normalize("NFC", row["output"])  # as scores compare both sides
